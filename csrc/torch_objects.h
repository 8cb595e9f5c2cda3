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

// Returns the shard in a wrapper of other tensors, if it is a DTensor.
inline Local inside(const at::Tensor& t, PyObject* object) {
  const auto inside = [](PyObject* object) {
    PyObject* const shard = DTensorType::read(object, dtensor.shard);
    return Local{&THPVariable_Unpack(shard), object, shard, DTensorType::read(object, dtensor.spec)};
  };
  if (object && Py_IS_TYPE(object, dtensor.type)) return inside(object);
  if (!dtensor.type) dtensor.find();
  object = THPVariable_Wrap(t);
  Py_DECREF(object);  // t holds another reference
  return dtensor.type && PyObject_TypeCheck(object, dtensor.type) ? inside(object) : Local{&t};
}

// `object` is the Python object of t, if the caller has it: t itself is then not read if it is a DTensor.
FUSED_HD Local local_of(const at::Tensor& t, PyObject* object = nullptr) {
  const bool wrapper = (object && Py_IS_TYPE(object, dtensor.type)) || is_wrapper(t);
  return wrapper ? inside(t, object) : Local{&t};
}

// Returns a hash of everything that a plan depends on of a tensor but its address: dtype, device, layout,
// conjugate and negative bits, sizes and strides. It is never 0.
//
// It is a hash because a poll compares up to five tensors for each parameter and mostly waits for memory: 8
// bytes for each of them instead of 16 for each dimension. Every number goes through a bijection, so layouts
// that differ in one number never share a hash. Others share one with the probability of two random numbers,
// 2^-64: no two of 12,940,744 layouts of matrices of 8 dtypes do.
FUSED_HD uint64_t layout_of(const at::Tensor& t) {
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
template <size_t kSize> FUSED_HD void prefetch(const void* object) {
  const char* const bytes = static_cast<const char*>(object);
#pragma GCC unroll 8
  for (size_t i = 0; i < kSize; i += 64) FUSED_PREFETCH(bytes + i);
  FUSED_PREFETCH(bytes + kSize - 1);
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
  FUSED_HD void prefetch() const {
    fused_adamw::prefetch<kPythonBytes>(python);
    if (owner) fused_adamw::prefetch<kGradientBytes>(owner);
    if (shard) fused_adamw::prefetch<kPythonBytes>(shard);
    fused_adamw::prefetch<sizeof(at::TensorImpl)>(impl);
    fused_adamw::prefetch<64>(storage);  // the address, the size, and the flags that say who may read it
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

// What a plan depends on of a tensor, and which objects it had when it was last seen. Nothing here keeps a
// tensor alive.
struct Seen {
  uint64_t layout = 0;  // 0: no tensor
  size_t reach = 0;     // bytes from its first element to the end of its last
  py::object spec;      // of a DTensor
  ObjectAddresses objects;

  Seen() = default;
  // `object`: its Python object, if the caller has it.
  explicit Seen(const at::Tensor& tensor, PyObject* object = nullptr) {
    const Local t = local_of(tensor, object);
    layout = layout_of(*t);
    spec = py::reinterpret_borrow<py::object>(t.spec);
    objects = ObjectAddresses(object ? object : t.dtensor, t);
    // A collective may still be writing a gradient, whose memory is then not seen.
    if (!t->has_storage() || !t->storage().data() || t->numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t->dim(); ++d) last += (t->size(d) - 1) * t->stride(d);
    reach = size_t(last + 1) * t->itemsize();
  }

  // Takes the address of a tensor that may have moved; returns whether all else is as it was. A tensor whose
  // storage was freed or cut is not. Memory that is written is first made the storage's own, which it may
  // share with others until then (copy on write).
  template <bool kWritten>
  FUSED_HD bool follow(const at::Tensor& tensor, PyObject* object, const void*& address) {
    const Local t = local_of(tensor, object);
    if (layout_of(*t) != layout || !same_spec(t)) return false;
    const at::TensorImpl& impl = *t->unsafeGetTensorImpl();
    at::StorageImpl* const storage = impl.unsafe_storage().unsafeGetStorageImpl();
    if (objects.storage != storage || objects.impl != &impl)
      objects = ObjectAddresses(object ? object : t.dtensor, t);
    if (!reach) return true;
    const size_t offset = impl.itemsize() * impl.storage_offset();
    if (!storage || storage->nbytes() < offset + reach) return false;
    const void* const data = kWritten ? storage->mutable_data() : storage->data();
    if (!data) return false;
    address = static_cast<const char*>(data) + offset;
    return true;
  }

private:
  bool same_spec(const Local& t) {
    if (t.spec == spec.ptr()) return true;
    if (!t.spec || !spec) return false;
    auto other = py::reinterpret_borrow<py::object>(t.spec);
    for (const char* name : {"mesh", "placements"})
      if (!other.attr(name).equal(spec.attr(name))) return false;
    spec = std::move(other);
    return true;
  }
};

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
