// Where torch keeps things: the one file that knows the layout of torch's objects. Reading them here takes 2
// ns each; an attribute takes 40 ns in Python, and an operator, which torch dispatches, takes 10,000.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>  // of Python: the offset of a slot in an object
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <stdexcept>

#include "step.h"

namespace py = pybind11;

namespace fused_adamw {

// torch's class DTensor, and the offsets in its objects of the local shard and of the spec, which has its
// placement.
struct DTensorType {
  PyTypeObject* type = nullptr;
  Py_ssize_t shard = 0, spec = 0;

  // Finds the class without importing it: no DTensor exists before its module is imported.
  void find() {
    const py::str name("torch.distributed.tensor");
    const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
    if (!module) return;
    const py::object found = module.attr("DTensor");
    shard = offset_of(found, "_local_tensor"), spec = offset_of(found, "_spec");
    type = reinterpret_cast<PyTypeObject*>(py::object(found).release().ptr());
  }
  static Py_ssize_t offset_of(const py::object& type, const char* name) {
    const py::object slot = type.attr(name);
    if (!Py_IS_TYPE(slot.ptr(), &PyMemberDescr_Type))
      throw py::type_error(
          std::string("fused_adamw cannot step DTensors with this version of torch: DTensor.") + name +
          " is no slot; use another version of torch");
    return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
  }
  static PyObject* read(PyObject* object, Py_ssize_t offset) {
    PyObject* const value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
    if (!value) throw py::value_error("a DTensor has no local shard: make it with torch.distributed.tensor");
    return value;
  }
};
inline DTensorType dtensor;

// Returns nullptr for an object that is not a tensor. DTensors are recognised first, because
// THPVariable_Check asks the metaclass of a subclass, which takes 60 ns.
inline const at::Tensor* tensor_of(PyObject* object) {
  const bool is_tensor = Py_IS_TYPE(object, dtensor.type) || THPVariable_Check(object);
  return is_tensor ? &THPVariable_Unpack(object) : nullptr;
}

// Whether a tensor wraps other tensors, as a DTensor does.
inline bool is_wrapper(const at::Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }

// The tensor whose memory is stepped: the local shard of a DTensor, or any other tensor itself.
struct Local {
  const at::Tensor* tensor = nullptr;
  PyObject *dtensor = nullptr, *shard = nullptr, *spec = nullptr;  // of a DTensor alone

  const at::Tensor& operator*() const { return *tensor; }
  const at::Tensor* operator->() const { return tensor; }
};

// `object` is the Python object of t, if the caller has it: t itself is then not read if it is a DTensor.
inline Local local_of(const at::Tensor& t, PyObject* object = nullptr) {
  const auto inside = [](PyObject* object) {
    PyObject* const shard = DTensorType::read(object, dtensor.shard);
    return Local{&THPVariable_Unpack(shard), object, shard, DTensorType::read(object, dtensor.spec)};
  };
  if (object && Py_IS_TYPE(object, dtensor.type)) return inside(object);
  if (!is_wrapper(t)) return {&t};
  if (!dtensor.type) dtensor.find();
  object = THPVariable_Wrap(t);
  Py_DECREF(object);  // t holds another reference
  return dtensor.type && PyObject_TypeCheck(object, dtensor.type) ? inside(object) : Local{&t};
}

// Returns nullptr for a tensor without memory of its own (a wrapper subclass); checks.py refuses those by
// name.
inline const void* address_of(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (!impl.has_storage() || !impl.numel()) return nullptr;
  // const_data_ptr() would check the same again, out of line.
  return static_cast<const char*>(impl.unsafe_storage().data()) + impl.itemsize() * impl.storage_offset();
}

// Returns a hash of everything that a plan depends on of a tensor but its address: dtype, device, layout,
// conjugate and negative bits, sizes and strides. It is never 0.
//
// It is a hash because a poll compares up to five tensors for each parameter and mostly waits for memory: 8
// bytes for each of them instead of 16 for each dimension. Every number goes through a bijection, so layouts
// that differ in one number never share a hash. Others share one with the probability of two random numbers,
// 2^-64: no two of 12,940,744 layouts of matrices of 8 dtypes do.
inline uint64_t layout_of(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  uint64_t hash = impl.key_set().raw_repr();
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  mix(uint64_t(t.scalar_type()) << 8 | uint8_t(t.device().index()));
  if (impl.layout() == at::kStrided)
    for (const at::IntArrayRef values : {impl.sizes(), impl.strides()})
      for (const int64_t value : values) mix(uint64_t(value));
  return hash ? hash : 1;
}

// Prefetches every cache line of an object. malloc aligns to 16 bytes, so most objects begin within a line.
// always_inline: GCC drops calls to a function that only prefetches.
FUSED_HD void prefetch(const void* object, size_t size) {
  const auto begin = reinterpret_cast<uintptr_t>(object);
  if (!object) return;
  for (uintptr_t line = begin & ~uintptr_t(63); size && line < begin + size; line += 64)
    FUSED_PREFETCH(reinterpret_cast<const void*>(line));
}

// The addresses of a tensor's objects when they were last read. They are only ever prefetched, so a stale
// address does no harm. The data of 1000 tensors and more goes through the caches at every step, so a poll of
// them is all misses. Without prefetching, 1000 tensors took 0.85 instead of 0.40 ms, and 10,000 took 16
// instead of 1.2 ms.
struct ObjectAddresses {
  const void *python = nullptr, *owner = nullptr, *shard = nullptr, *impl = nullptr, *storage = nullptr;

  ObjectAddresses() = default;
  ObjectAddresses(const void* object, const Local& t)
      : python(object), owner(t.dtensor ? THPVariable_Unpack(t.dtensor).unsafeGetTensorImpl() : nullptr),
        shard(t.shard), impl(t->unsafeGetTensorImpl()),
        storage(t->has_storage() ? t->storage().unsafeGetStorageImpl() : nullptr) {}
  // `owner_bytes`: how much will be read of a DTensor's own implementation.
  FUSED_HD void prefetch(size_t owner_bytes) const {
    fused_adamw::prefetch(python, kPythonBytes);
    fused_adamw::prefetch(owner, owner_bytes);
    fused_adamw::prefetch(shard, kPythonBytes);
    fused_adamw::prefetch(impl, sizeof(at::TensorImpl));
    fused_adamw::prefetch(storage, 64);  // the address, and the flags that say who may read it
  }
  // Prefetches what bump_version() reads.
  FUSED_HD void prefetch_version() const {
    FUSED_PREFETCH(python);
    FUSED_PREFETCH(owner);
    FUSED_PREFETCH(shard);
    FUSED_PREFETCH(impl);
  }
  static constexpr size_t kPythonBytes = 64;    // a DTensor object with its slots
  static constexpr size_t kGradientBytes = 32;  // an implementation up to the pointer to its gradient
};
constexpr size_t kAhead = 4;  // how many tensors ahead to prefetch

// Returns the address of a dict's table of keys, to prefetch.
inline const void* keys_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_keys; }
constexpr size_t kKeysBytes = 3 * 64;  // the table of a dict with a few entries

// Counts a change of a tensor's data, and of a DTensor's shard, for autograd.
inline void bump_version(PyObject* param) {
  const at::Tensor& p = THPVariable_Unpack(param);
  p.unsafeGetTensorImpl()->bump_version();
  const Local local = local_of(p, param);
  if (local.shard) local->unsafeGetTensorImpl()->bump_version();
}

}  // namespace fused_adamw
