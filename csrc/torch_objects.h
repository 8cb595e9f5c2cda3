// Where torch keeps things: the one file that knows the layout of torch's objects. Reading them here takes 2
// ns each; an attribute takes 40 ns in Python, and an operator, which torch dispatches, takes 10,000.
#pragma once

#include <c10/core/impl/COW.h>
#include <pybind11/pybind11.h>
#include <structmember.h>  // of Python: the offset of a slot in an object
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstring>
#include <set>
#include <stdexcept>
#include <vector>

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

// Everything that a plan depends on of a tensor but its address, as numbers. LAYOUT_KEYS is torch's set of
// dispatch keys, which has the kind of device, sparsity, and the conjugate and negative bits; for the kind
// see kind_of(). Sizes and then strides follow where a tensor is dense.
using Layout = std::vector<int64_t>;
enum { LAYOUT_KEYS, LAYOUT_KIND, LAYOUT_ITEMSIZE, LAYOUT_DENSE, LAYOUT_SIZES };

FUSED_HD int64_t kind_of(const at::TensorImpl& impl, size_t dims) {
  return int64_t(dims) << 16 | int64_t(uint8_t(impl.dtype().toScalarType())) << 8 |
         uint8_t(impl.device().index());
}
inline Layout layout_of(const at::TensorImpl& impl) {
  const bool dense = impl.layout() == at::kStrided;
  Layout layout{int64_t(impl.key_set().raw_repr()), kind_of(impl, dense ? impl.sizes().size() : 0),
                int64_t(impl.itemsize()), dense};
  if (dense) {
    layout.insert(layout.end(), impl.sizes().begin(), impl.sizes().end());
    layout.insert(layout.end(), impl.strides().begin(), impl.strides().end());
  }
  return layout;
}
// Whether layout_of(impl) has the numbers from `layout` on.
FUSED_HD bool has_layout(const at::TensorImpl& impl, const int64_t* layout) {
  if (int64_t(impl.key_set().raw_repr()) != layout[LAYOUT_KEYS]) return false;
  if (!layout[LAYOUT_DENSE]) return kind_of(impl, 0) == layout[LAYOUT_KIND];
  const at::IntArrayRef sizes = impl.sizes(), strides = impl.strides();
  const size_t dims = sizes.size();
  if (kind_of(impl, dims) != layout[LAYOUT_KIND]) return false;
  const int64_t* const seen = layout + LAYOUT_SIZES;
  for (size_t d = 0; d < dims; ++d)
    if (sizes[d] != seen[d] || strides[d] != seen[dims + d]) return false;
  return true;
}

// The layouts that a watch has seen, each of them once: a poll compares five tensors for each parameter, and
// finds the few layouts of a model in the L1 cache.
using Layouts = std::set<Layout>;

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
    if (owner) {
      fused_adamw::prefetch<kSlotBytes>(python);
      fused_adamw::prefetch<kGradientBytes>(owner);
      fused_adamw::prefetch<kPythonBytes>(shard);
    }
    fused_adamw::prefetch<sizeof(at::TensorImpl)>(impl);
    fused_adamw::prefetch<64>(storage);  // the address, the size, and the flags that say who may read it
  }
  // Prefetches what bump_version() reads, but for the counter itself.
  FUSED_HD void prefetch_version() const {
    FUSED_PREFETCH(python);
    if (owner) FUSED_PREFETCH(owner), FUSED_PREFETCH(shard);
    fused_adamw::prefetch<kGradientBytes>(impl);
  }
  static constexpr size_t kPythonBytes = offsetof(THPVariable, cdata) + sizeof(at::Tensor);
  static constexpr size_t kSlotBytes = 64;      // a DTensor object with its slots
  static constexpr size_t kGradientBytes = 48;  // an implementation up to its autograd metadata and version
};
constexpr size_t kAhead = 3;      // how many tensors ahead to prefetch
constexpr size_t kFarAhead = 16;  // where little is done for each

// What a plan depends on of a tensor, and which objects it had when it was last seen. Nothing here keeps a
// tensor alive.
struct Seen {
  const int64_t* layout = nullptr;  // numbers of one of the watch's layouts
  size_t reach = 0;                 // bytes from its first element to the end of its last
  py::object spec;                  // of a DTensor, and of nothing else
  ObjectAddresses objects;

  Seen() = default;
  // `object`: its Python object, if the caller has it.
  Seen(Layouts& layouts, const at::Tensor& tensor, PyObject* object = nullptr) {
    const Local t = local_of(tensor, object);
    layout = layouts.insert(layout_of(*t->unsafeGetTensorImpl())).first->data();
    spec = py::reinterpret_borrow<py::object>(t.spec);
    take_addresses(tensor, object);
    // A collective may still be writing a gradient, whose memory is then not seen.
    if (!t->has_storage() || !t->storage().data() || t->numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t->dim(); ++d) last += (t->size(d) - 1) * t->stride(d);
    reach = size_t(last + 1) * t->itemsize();
  }

  // Takes the address of a tensor that may have moved; returns whether all else is as it was. A tensor whose
  // storage was freed or cut is not. Memory that is written is first made the storage's own, which it may
  // share with others until then (copy on write). kPlain: by a thread without the GIL; returns false too
  // where that takes Python code or a copy.
  template <bool kWritten, bool kPlain>
  FUSED_HD bool follow(const at::Tensor& tensor, PyObject* object, const void*& address) {
    const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    if (kPlain && (spec || is_wrapper(tensor))) return false;
    if (spec) {  // else a DTensor has other keys
      const Local t = local_of(tensor, object);
      if (!same_spec(t)) return false;
      impl = t->unsafeGetTensorImpl();
    }
    if (!has_layout(*impl, layout)) return false;
    at::StorageImpl* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
    if (objects.storage != storage || objects.impl != impl) take_addresses(tensor, object);
    if (!reach) return true;
    const size_t offset = layout[LAYOUT_ITEMSIZE] * impl->storage_offset();
    if (!storage || storage->nbytes() < offset + reach) return false;
    if (kPlain && kWritten && c10::impl::cow::is_cow_data_ptr(storage->data_ptr())) return false;
    const void* const data = kWritten && !kPlain ? storage->mutable_data() : storage->data();
    if (!data) return false;
    address = static_cast<const char*>(data) + offset;
    return true;
  }

private:
  void take_addresses(const at::Tensor& tensor, PyObject* object) {
    const Local t = local_of(tensor, object);
    objects = ObjectAddresses(object ? object : t.dtensor, t);
  }
  bool same_spec(const Local& t) {
    if (t.spec == spec.ptr()) return true;
    if (!t.spec) return false;
    auto other = py::reinterpret_borrow<py::object>(t.spec);
    for (const char* name : {"mesh", "placements"})
      if (!other.attr(name).equal(spec.attr(name))) return false;
    spec = std::move(other);
    return true;
  }
};

// Returns a number that no other dict and no other contents of it ever had (PEP 509), or 0: Python 3.14 has
// none, and a dict that shares its keys with others may change without one.
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030e0000 && !defined(Py_GIL_DISABLED)
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif
  const auto* const d = reinterpret_cast<PyDictObject*>(dict);
  return d->ma_values ? 0 : d->ma_version_tag;
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#else
  return 0;
#endif
}

// Returns where the gradient of a tensor is kept; nullptr where there is no place for one.
FUSED_HD const at::Tensor* gradient_of(const at::TensorImpl& impl) {
  const auto* const meta = static_cast<torch::autograd::AutogradMeta*>(impl.autograd_meta());
  return meta ? &meta->grad_ : nullptr;
}

// Returns the address of a tensor's counter of changes, to prefetch.
FUSED_HD const void* version_counter_of(const at::TensorImpl& impl) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*), "a counter is one pointer");
  const void* address;
  std::memcpy(&address, &impl.version_counter(), sizeof(address));
  return address;
}

// Counts a change of a tensor's data, and of a DTensor's shard, for autograd.
inline void bump_version(PyObject* param) {
  const at::Tensor& p = THPVariable_Unpack(param);
  p.unsafeGetTensorImpl()->bump_version();
  const Local local = local_of(p, param);
  if (local.shard) local->unsafeGetTensorImpl()->bump_version();
}

}  // namespace fused_adamw
