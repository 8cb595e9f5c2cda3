// The extension module fused_adamw._C: what a step needs of Python's and torch's objects, gathered in C++
// (some 60 ns a tensor), and the CPU launch. The only file that sees torch.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>  // of Python: where a slot lies
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "scalars.h"
#include "step.h"
#include "stream.h"

#if defined(FUSED_ADAMW_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

namespace py = pybind11;

namespace fused_adamw {
namespace {

// torch's DTensor, and where its objects keep the shard of this rank and its placement: 2 ns to read each,
// where an attribute takes 40 and an operator, which is dispatched, 10,000.
struct DTensorType {
  PyTypeObject* type = nullptr;
  Py_ssize_t shard = 0, spec = 0;

  // Without an import: a DTensor exists only where this was imported.
  void find() {
    const py::str name("torch.distributed.tensor");
    const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
    if (!module) return;
    const py::object found = module.attr("DTensor");
    shard = offset(found, "_local_tensor"), spec = offset(found, "_spec");
    type = reinterpret_cast<PyTypeObject*>(py::object(found).release().ptr());
  }
  static Py_ssize_t offset(const py::object& type, const char* name) {
    const py::object slot = type.attr(name);
    if (!Py_IS_TYPE(slot.ptr(), &PyMemberDescr_Type))
      throw py::type_error(
          "fused_adamw does not know where the DTensor of this version of torch keeps its shard");
    return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
  }
  static PyObject* read(PyObject* object, Py_ssize_t offset) {
    PyObject* const value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
    if (!value) throw py::value_error("a DTensor without a shard");
    return value;
  }
};
DTensorType dtensor;

// The check of a subclass of Tensor, which asks its metaclass, takes 60 ns.
const at::Tensor* tensor_of(PyObject* object) {
  const bool is = Py_IS_TYPE(object, dtensor.type) || THPVariable_Check(object);
  return is ? &THPVariable_Unpack(object) : nullptr;
}

// Whether it is a wrapper of other tensors, such as a DTensor.
bool is_wrapper(const at::Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }

// The tensor whose memory is stepped: of a DTensor, which holds the rest, the shard of this rank; any other
// tensor itself.
struct Local {
  const at::Tensor* tensor = nullptr;
  PyObject *dtensor = nullptr, *shard = nullptr, *spec = nullptr;

  const at::Tensor& operator*() const { return *tensor; }
  const at::Tensor* operator->() const { return tensor; }
};

// `object` is the Python object of t, where it is at hand: of a DTensor, t itself is not even read then.
Local local_of(const at::Tensor& t, PyObject* object = nullptr) {
  const auto inside = [](PyObject* object) {
    PyObject* const shard = DTensorType::read(object, dtensor.shard);
    return Local{&THPVariable_Unpack(shard), object, shard, DTensorType::read(object, dtensor.spec)};
  };
  if (object && Py_IS_TYPE(object, dtensor.type)) return inside(object);
  if (!is_wrapper(t)) return {&t};
  if (!dtensor.type) dtensor.find();
  object = THPVariable_Wrap(t);
  Py_DECREF(object);  // t keeps it
  return dtensor.type && PyObject_TypeCheck(object, dtensor.type) ? inside(object) : Local{&t};
}

// nullptr for a tensor without memory of its own (a wrapper subclass); plan.py refuses those by name.
const void* address_of(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  if (!impl.has_storage() || !impl.numel()) return nullptr;
  // const_data_ptr() would ask again, out of line.
  return static_cast<const char*>(impl.unsafe_storage().data()) + impl.itemsize() * impl.storage_offset();
}

// All that a plan depends on of a tensor but its address: dtype, device, layout, conjugate and negative bits,
// sizes and strides, in 64 bits, since a poll reads them at every step. Never 0.
uint64_t layout_of(const at::Tensor& t) {
  const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
  uint64_t hash =
      impl.key_set().raw_repr() ^ uint64_t(t.scalar_type()) << 48 ^ uint64_t(t.device().index()) << 56;
  if (impl.layout() != at::kStrided) return hash | 1;
  for (const at::IntArrayRef values : {impl.sizes(), impl.strides()})
    for (const int64_t value : values)
      hash = (hash ^ uint64_t(value)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  return hash | 1;
}

// Every cache line of an object: malloc aligns to 16 bytes, so most begin within one. Inlined by force, since
// a function that does nothing but this has no effect that the compiler knows of, and its calls are left out.
FUSED_HD void prefetch(const void* object, size_t size) {
  const auto begin = reinterpret_cast<uintptr_t>(object);
  if (!object) return;
  for (uintptr_t line = begin & ~uintptr_t(63); size && line < begin + size; line += 64)
    FUSED_PREFETCH(reinterpret_cast<const void*>(line));
}

// Where a tensor's objects lay when they were last seen. Only ever prefetched, so a stale address does no
// harm: of 1000 tensors and more, whose data goes through the caches at every step, a poll is all misses.
struct Objects {
  const void *python = nullptr, *owner = nullptr, *shard = nullptr, *impl = nullptr, *storage = nullptr;

  Objects() = default;
  Objects(const void* object, const Local& t)
      : python(object), owner(t.dtensor ? THPVariable_Unpack(t.dtensor).unsafeGetTensorImpl() : nullptr),
        shard(t.shard), impl(t->unsafeGetTensorImpl()),
        storage(t->has_storage() ? t->storage().unsafeGetStorageImpl() : nullptr) {}
  // `read` bytes are read of a DTensor itself.
  FUSED_HD void prefetch(size_t read) const {
    fused_adamw::prefetch(python, kPython);
    fused_adamw::prefetch(owner, read);
    fused_adamw::prefetch(shard, kPython);
    fused_adamw::prefetch(impl, sizeof(at::TensorImpl));
    fused_adamw::prefetch(storage, 64);  // the address, and the flags of who may read it
  }
  // What counting a version reads.
  FUSED_HD void prefetch_version() const {
    FUSED_PREFETCH(python);
    FUSED_PREFETCH(owner);
    FUSED_PREFETCH(shard);
    FUSED_PREFETCH(impl);
  }
  static constexpr size_t kPython = 64;    // of a DTensor with its slots
  static constexpr size_t kGradient = 32;  // of a tensor up to where its gradient is
};
constexpr size_t kAhead = 4;  // tensors

// Whether f(i) holds for every i below n. What takes the time is to wait for memory: two threads need half of
// it.
template <class F> bool all(size_t n, bool parallel, const F& f) {
  bool holds = true;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) reduction(&& : holds) if (parallel && !omp_in_parallel())
#endif
  for (size_t i = 0; i < n; ++i) holds = holds && f(i);
  return holds;
}
constexpr size_t kParallel = 1000;  // tensors, from which on

struct Slot {  // one entry of a group's "params"
  py::object param;
  int group;
  Py_ssize_t place;  // in the list
  bool wrapped;      // a DTensor
  const void* p;
  uint64_t p_layout, g_layout = 0;  // 0: no gradient
  Objects p_objects, g_objects;
  const void* autograd = nullptr;
  py::object g_spec;  // placement of a gradient that is a DTensor, as last seen
};

struct Live {  // what a step takes from a slot and puts there, close together
  const void* g = nullptr;
  float* step = nullptr;  // nullptr: not stepped, or counted on the device
  int group = -1;
  int scalars = -1;
};

struct Seen {  // one entry of a parameter's state, held so that its address stays its own
  py::object key, value;
  bool plain;  // a tensor of torch's own type, and no wrapper
  const void* address;
  uint64_t layout;  // 0 for what is no tensor
  Objects objects;
};

struct State {  // one entry of the optimizer's state
  py::object key, value;
  Py_ssize_t place;    // in the dict
  const void* keys;    // of the value, a dict; to prefetch
  size_t first, last;  // what was seen in it
};

// Whether nothing can change in it while it stays the same object.
bool is_constant(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value) || THPDtype_Check(value);
}

// What a step takes from one of the optimizer's groups.
class Group {
public:
  // kind(group): what of it plans depend on; hyper(group): the numbers that kHyper tells of.
  Group(PyObject* group, const py::object& kind) { see(group, kind); }

  // Whether its plans still hold. Options are compared by identity, 2 ns each; asking for the kind takes 170.
  bool holds(PyObject* group, const py::object& kind) {
    if (constant_ && is_as_seen(group)) return true;
    Group now(group, kind);
    const bool same = now.kind_.equal(kind_);
    *this = std::move(now);  // not where one of these has thrown
    return same;
  }

  template <bool kAdam> py::tuple row(PyObject* group, const py::object& hyper, double count) {
    if (!read_) read<kAdam>(group, hyper);
    if (!(count >= 1))
      throw py::value_error("a parameter's 'step' is negative: load a checkpoint, or set it to 0");
    std::array<double, kScalars> values;
    const auto power = [](double x, double n) { return std::pow(x, n); };
    scalars_of<kAdam>(hyper_.data(), count, power, values.data());
    py::tuple row(kScalars);
    for (int i = 0; i < kScalars; ++i) PyTuple_SET_ITEM(row.ptr(), i, PyFloat_FromDouble(values[i]));
    return row;
  }

private:
  struct Item {
    py::object key, value;
  };

  void see(PyObject* group, const py::object& kind) {
    items_.clear();
    constant_ = true, read_ = false, lr_ = -1;
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value);) {
      const auto is = [key](const char* name) {
        return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
      };
      if (is("lr")) lr_ = ptrdiff_t(items_.size());
      if (!is("params") && !is("param_names")) constant_ &= is_constant(value);
      items_.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value)});
    }
    kind_ = kind(py::handle(group));
  }

  // A schedule sets another lr at every step, so that is taken at once.
  bool is_as_seen(PyObject* group) {
    if (size_t(PyDict_Size(group)) != items_.size()) return false;
    PyObject *key, *value;
    size_t k = 0;
    for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value); ++k) {
      if (key != items_[k].key.ptr()) return false;
      if (value == items_[k].value.ptr()) continue;
      if (ptrdiff_t(k) != lr_ || !PyFloat_CheckExact(value)) return false;
      items_[k].value = py::reinterpret_borrow<py::object>(value);
      hyper_[0] = PyFloat_AS_DOUBLE(value);
      read_ &= 0 <= hyper_[0] && hyper_[0] < HUGE_VAL;
    }
    return true;
  }

  template <bool kAdam> void read(PyObject* group, const py::object& hyper) {
    const auto numbers = py::tuple(hyper(py::handle(group)));
    for (int i = 0; i < kHyper; ++i)
      hyper_[i] =
          py::float_(i ? py::object(numbers[i]) : py::object(py::handle(group)["lr"]));  // lr: a tensor, too
    // Dampening may be any number, and so may the sign.
    const auto in = [](double x, double end) { return 0 <= x && x < end; };
    bool good = hyper_[1] > 0;
    for (const int i : {0, 2, 3, 5, 7}) good &= in(hyper_[i], HUGE_VAL);
    if (kAdam) good &= in(hyper_[5], 1) && in(hyper_[6], 1);
    if (!good) throw py::value_error("a hyperparameter of a group is out of range");
    read_ = true;
  }

  std::vector<Item> items_;  // held, so that an address stays its own
  py::object kind_;
  std::array<double, kHyper> hyper_;
  ptrdiff_t lr_;   // which of the items it is
  bool constant_;  // the values of all items are
  bool read_;      // hyper_ is that of the items
};

// A row of scalars; pybind's own conversion to a vector takes 7 times as long.
std::array<double, kScalars> numbers_of(py::handle row) {
  std::array<double, kScalars> values;
  if (!PyTuple_Check(row.ptr()) || PyTuple_GET_SIZE(row.ptr()) != kScalars)
    throw py::value_error("a row of scalars is a tuple of " + std::to_string(kScalars) + " numbers");
  for (int i = 0; i < kScalars; ++i) {
    values[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(row.ptr(), i));
    if (values[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return values;
}

// What the plans of an optimizer were built from. plan.Watch is the same in Python.
class Watch {
public:
  // on_device: for each parameter, whether its steps are counted there. kind, hyper: of Group. `kind`, which
  // knows the optimizer, is not kept: the optimizer keeps this, and the garbage collector would see no cycle.
  Watch(const py::list& groups, const py::dict& state, const std::vector<bool>& on_device,
        const py::object& kind, const std::string& rule, py::object hyper)
      : groups_(groups), state_(state), hyper_(std::move(hyper)), adam_(rule == "adam") {
    for (const py::handle& group : groups) {
      const auto params = group["params"].cast<py::list>();
      settings_.emplace_back(group.ptr(), kind);
      for (size_t k = 0; k < params.size(); ++k) add(params[k], on_device.at(slots_.size()), Py_ssize_t(k));
    }
    PyObject *key, *value;
    for (Py_ssize_t i = 0, place = 0; PyDict_Next(state.ptr(), &i, &key, &value); place = i)
      add(key, value, place);
    parallel_ = parallel_ && slots_.size() >= kParallel;
  }

  // Whether the plans still hold: same groups, parameters, states, layouts. Addresses of gradients may
  // change.
  bool poll(const py::list& groups, const py::dict& state, const py::object& kind) {
    if (groups.ptr() != groups_.ptr() || state.ptr() != state_.ptr() || groups.size() != settings_.size() ||
        state.size() != states_.size())
      return false;
    std::vector<PyObject*> params(groups.size());
    size_t n = 0;
    for (size_t g = 0; g < params.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), g);
      if (!PyDict_Check(group) || !settings_[g].holds(group, kind)) return false;
      params[g] = PyDict_GetItem(group, params_key_.ptr());
      if (!params[g] || !PyList_Check(params[g])) return false;
      n += PyList_GET_SIZE(params[g]);
    }
    if (n != slots_.size()) return false;
    return all(n, parallel_,
               [&](size_t i) {
                 if (i + kAhead < n) {
                   const Slot& next = slots_[i + kAhead];
                   next.p_objects.prefetch(Objects::kGradient);
                   next.g_objects.prefetch(sizeof(at::TensorImpl));
                   FUSED_PREFETCH(next.autograd);
                 }
                 const Slot& slot = slots_[i];
                 PyObject* const list = params[slot.group];
                 return slot.place < PyList_GET_SIZE(list) &&
                        PyList_GET_ITEM(list, slot.place) == slot.param.ptr() && same(slots_[i], live_[i]);
               }) &&
           all(states_.size(), parallel_, [this](size_t i) { return same_state(i); });
  }

  // The rows of scalars of the step to come, one for each distinct (group, step); a slot knows its own.
  py::list rows() {
    py::list rows;
    int first = 0, n = 0, group = -1;
    std::vector<float> counts;
    for (size_t i = 0; i < live_.size(); ++i) {
      if (i + kAhead < live_.size()) FUSED_PREFETCH(live_[i + kAhead].step);
      Live& s = live_[i];
      if (!s.step) continue;
      if (s.group != group) {
        group = s.group;
        first = n;
      }
      const float count = *s.step + 1;
      int k = first;
      while (k < n && counts[k] != count) ++k;
      if (k == n) {
        PyObject* const options = PyList_GET_ITEM(groups_.ptr(), group);
        counts.push_back(count);
        rows.append(adam_ ? settings_[group].row<true>(options, hyper_, count)
                          : settings_[group].row<false>(options, hyper_, count));
        ++n;
      }
      s.scalars = k;
    }
    return rows;
  }

  // Count the step, and tell autograd that the parameters have changed.
  void advance() {
    all(live_.size(), parallel_, [this](size_t i) {
      if (i + kAhead < live_.size()) slots_[i + kAhead].p_objects.prefetch_version();
      if (slots_[i].g_layout) {
        const at::Tensor& p = THPVariable_Unpack(slots_[i].param.ptr());
        p.unsafeGetTensorImpl()->bump_version();
        const Local local = local_of(p, slots_[i].param.ptr());
        if (local.shard) local->unsafeGetTensorImpl()->bump_version();
      }
      if (live_[i].step) ++*live_[i].step;
      return true;
    });
  }

  // Bring the tables of a launch to this step in one copy: the rows if any changed or `all` is set, and the
  // rows of scalars, which follow them in `buffer`. `table` is a copy of the rows, int64 [n, 16], on the
  // host: column 1 is the address of the gradient (kept for a slot of -1 - slot), 6 the index of the row of
  // scalars (kept where steps are not counted here), bit 0 of 7 whether all addresses are multiples of 16,
  // and bit 1 (kept) whether the elements lie so in a parameter of which this is a shard. torch's caching
  // allocator of pinned memory does not hand the staging memory out again before the copy is done; a graph,
  // which copies from it at each replay, brings its own.
  void upload(const at::Tensor& table, const at::Tensor& slots, const py::list& scalars,
              const at::Tensor& buffer, bool all, const std::optional<at::Tensor>& own_staging) const {
    const bool rows = update(table, slots) || all;
    const size_t n = scalars.size(), start = rows ? 0 : table.nbytes();
    const size_t bytes = table.nbytes() - start + n * kScalars * sizeof(float);
    if (!bytes) return;
    const at::Tensor staging =
        own_staging
            ? *own_staging
            : at::empty({int64_t(bytes)}, at::TensorOptions(at::kByte).pinned_memory(buffer.is_cuda()));
    char* to = static_cast<char*>(staging.mutable_data_ptr());
    if (rows) to = std::copy_n(static_cast<const char*>(table.const_data_ptr()), table.nbytes(), to);
    for (const py::handle& row : scalars) {
      const auto values = numbers_of(row);
      for (int i = 0; i < kScalars; ++i, to += sizeof(float)) {
        const float value = float(values[i]);
        std::memcpy(to, &value, sizeof(value));
      }
    }
    buffer.narrow(0, int64_t(start), int64_t(bytes)).copy_(staging, /*non_blocking=*/true);
  }

  int scalars_of(size_t slot) const { return live_.at(slot).scalars; }
  const at::Tensor& grad(size_t i) const {
    return THPVariable_Unpack(slots_.at(i).param.ptr()).unsafeGetTensorImpl()->grad();
  }
  const Live& live(size_t i) const { return live_.at(i); }

private:
  bool update(const at::Tensor& table, const at::Tensor& slots) const {
    int64_t* row = table.mutable_data_ptr<int64_t>();
    const int64_t* const slot = slots.const_data_ptr<int64_t>();
    bool changed = false;
    const auto set = [&changed](int64_t& to, int64_t value) {
      changed |= to != value;
      to = value;
    };
    for (int64_t i = 0; i < table.size(0); ++i, row += kColumns) {
      const Live& s = live_.at(slot[i] < 0 ? -1 - slot[i] : slot[i]);
      if (slot[i] >= 0) set(row[1], reinterpret_cast<int64_t>(s.g));
      if (s.step) set(row[6], s.scalars);
      const int64_t all = row[0] | row[1] | row[2] | row[3] | row[4] | row[8] | row[9] | row[10];
      set(row[7], (row[7] & 2) | ((row[7] & 2) && !(all & 15)));
    }
    return changed;
  }

  void add(py::handle param, bool on_device, Py_ssize_t place) {
    const int group = int(settings_.size()) - 1;
    const at::Tensor* owner = tensor_of(param.ptr());
    if (!owner) throw py::type_error("a parameter is no tensor");
    const Local p = local_of(*owner, param.ptr());
    Slot s{py::reinterpret_borrow<py::object>(param),
           group,
           place,
           is_wrapper(*owner),
           address_of(*p),
           layout_of(*p)};
    // Without a GIL of their own, threads may call nothing of Python's, nor count a version that would throw.
    parallel_ = parallel_ && !s.wrapped && !owner->is_inference();
    const at::Tensor& grad = owner->unsafeGetTensorImpl()->grad();
    Live live;
    live.group = group;
    s.p_objects = Objects(param.ptr(), p);
    s.autograd = owner->unsafeGetTensorImpl()->autograd_meta();
    if (grad.defined()) {
      const Local g = local_of(grad);
      s.g_objects = Objects(g.dtensor, g);
      s.g_layout = layout_of(*g);
      s.g_spec = py::reinterpret_borrow<py::object>(g.spec);
      live.g = address_of(*g);
    }
    if (grad.defined() && !on_device) {
      PyObject* own = PyDict_GetItem(state_.ptr(), param.ptr());
      PyObject* step = own ? PyDict_GetItemString(own, "step") : nullptr;
      const at::Tensor* t = step ? tensor_of(step) : nullptr;
      if (!t || !t->is_cpu() || t->scalar_type() != at::kFloat || t->numel() != 1)
        throw py::value_error("a parameter has no 'step', a float32 tensor of one element on the CPU");
      live.step = t->mutable_data_ptr<float>();
    }
    live_.push_back(live);
    slots_.push_back(std::move(s));
  }

  void add(PyObject* key, PyObject* value, Py_ssize_t place) {
    const size_t first = seen_.size();
    PyObject *name, *item;
    for (Py_ssize_t i = 0; PyDict_Check(value) && PyDict_Next(value, &i, &name, &item);) {
      const at::Tensor* tensor = tensor_of(item);
      const Local t = tensor ? local_of(*tensor, item) : Local();
      const bool plain = tensor && THPVariable_CheckExact(item) && !is_wrapper(*tensor);
      seen_.push_back({py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(item),
                       plain, tensor ? address_of(*t) : nullptr, tensor ? layout_of(*t) : 0,
                       tensor ? Objects(item, t) : Objects()});
      parallel_ = parallel_ && (plain || !tensor);
    }
    states_.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value),
                       place, PyDict_Check(value) ? reinterpret_cast<PyDictObject*>(value)->ma_keys : nullptr,
                       first, seen_.size()});
  }

  static bool same(Slot& s, Live& live) {
    const at::Tensor& owner = THPVariable_Unpack(s.param.ptr());
    if (!s.wrapped && is_wrapper(owner)) return false;
    const Local p = local_of(owner, s.param.ptr());
    if (address_of(*p) != s.p || layout_of(*p) != s.p_layout) return false;
    const at::Tensor& grad = owner.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return !s.g_layout;
    if (!s.wrapped && is_wrapper(grad)) return false;
    const Local g = local_of(grad);
    if (layout_of(*g) != s.g_layout || !placed_as_before(s, g)) return false;
    live.g = address_of(*g);
    if (s.g_objects.impl != g->unsafeGetTensorImpl()) s.g_objects = Objects(g.dtensor, g);
    return live.g || g->numel() == 0;
  }

  static bool placed_as_before(Slot& s, const Local& g) {
    if (g.spec == s.g_spec.ptr()) return true;
    if (!g.spec || !s.g_spec) return false;
    auto spec = py::reinterpret_borrow<py::object>(g.spec);
    for (const char* name : {"mesh", "placements"})
      if (!spec.attr(name).equal(s.g_spec.attr(name))) return false;
    s.g_spec = std::move(spec);
    return true;
  }

  bool same_state(size_t i) const {
    if (i + kAhead < states_.size()) {
      const State& next = states_[i + kAhead];
      prefetch(next.value.ptr(), Objects::kPython);
      prefetch(next.keys, 3 * 64);  // of the dict
      for (size_t j = next.first; j < next.last; ++j) seen_[j].objects.prefetch(0);
    }
    const State& s = states_[i];
    PyObject *key, *value, *item;
    Py_ssize_t place = s.place;
    if (!PyDict_Next(state_.ptr(), &place, &key, &value) || key != s.key.ptr() || value != s.value.ptr())
      return false;
    size_t j = s.first;
    for (Py_ssize_t k = 0; PyDict_Check(value) && PyDict_Next(value, &k, &key, &item); ++j) {
      if (j == s.last || key != seen_[j].key.ptr() || item != seen_[j].value.ptr()) return false;
      const Seen& was = seen_[j];
      if (!was.layout) continue;
      const at::Tensor& tensor = THPVariable_Unpack(item);
      if (was.plain && is_wrapper(tensor)) return false;
      const Local t = was.plain ? Local{&tensor} : local_of(tensor, item);
      if (was.address != address_of(*t) || was.layout != layout_of(*t)) return false;
    }
    return j == s.last;
  }

  py::list groups_;
  py::dict state_;
  py::str params_key_{"params"};
  py::object hyper_;
  bool adam_;
  std::vector<Group> settings_;
  std::vector<Slot> slots_;
  std::vector<Live> live_;
  std::vector<Seen> seen_;
  std::vector<State> states_;
  bool parallel_ = true;  // whether threads may share a poll
};

Format format_of(at::ScalarType dtype) {
  switch (dtype) {
  case at::kFloat: return Format::f32;
  case at::kDouble: return Format::f64;
  case at::kBFloat16: return Format::bf16;
  case at::kHalf: return Format::f16;
  case at::kChar: return Format::i8;
  default: throw py::type_error(std::string("no format for ") + at::toString(dtype));
  }
}

Rule rule_of(const std::string& name) {
  if (name == "adam") return Rule::adam;
  if (name == "adam_amsgrad") return Rule::adam_amsgrad;
  if (name == "sgd") return Rule::sgd;
  if (name == "sgd_momentum") return Rule::sgd_momentum;
  throw py::value_error("no rule " + name);
}

Master master_of(const std::string& name) {
  if (name == "none") return Master::none;
  if (name == "kahan") return Master::kahan;
  if (name == "split16") return Master::split16;
  if (name == "fp32") return Master::fp32;
  throw py::value_error("no master " + name);
}

int best_isa() {
  int last = 0;
  while (cpu_isas()[last + 1]) ++last;
  return last;
}
int isa = best_isa();

// The rows of one launch on the CPU.
class CpuStep {
public:
  // rows: of plan.Row.
  CpuStep(const Watch& watch, const py::list& rows) : watch_(watch) {
    for (const py::handle& item : rows) {
      const auto slot = item.attr("slot").cast<size_t>();
      const auto p = item.attr("p").cast<at::Tensor>();
      const auto g = item.attr("g").cast<std::optional<at::Tensor>>();
      const auto states = item.attr("states").cast<std::vector<at::Tensor>>();
      const auto extra = item.attr("extra").cast<std::optional<at::Tensor>>();
      const auto scales = item.attr("scales").cast<std::vector<at::Tensor>>();
      Row row{};
      row.p = p.mutable_data_ptr();
      row.numel = p.numel();
      row.p_format = format_of(p.scalar_type());
      row.rule = rule_of(item.attr("rule").cast<std::string>());
      row.g = g ? g->const_data_ptr() : nullptr;
      row.g_format = format_of(c10::toRealValueType((g ? *g : watch.grad(slot)).scalar_type()));
      if (states.size() > kMaxStates || scales.size() > std::size(row.scales))
        throw py::value_error("a row has too many states");
      for (size_t j = 0; j < states.size(); ++j) row.state[j] = states[j].mutable_data_ptr();
      row.state_format = states.empty() ? row.p_format : format_of(states[0].scalar_type());
      row.master = master_of(item.attr("master").cast<std::string>());
      row.stochastic = item.attr("stochastic").cast<bool>();
      row.extra = extra ? extra->mutable_data_ptr() : nullptr;
      for (size_t j = 0; j < scales.size(); ++j) row.scales[j] = scales[j].mutable_data_ptr<float>();
      row.seed = item.attr("seed").cast<uint64_t>();
      row.index = item.attr("index").cast<uint32_t>();
      std::tie(row.offset, row.run, row.skip) =
          item.attr("place").cast<std::tuple<int64_t, int64_t, int64_t>>();
      rows_.push_back(row);
      slots_.push_back({slot, !g});
      held_.push_back(p);
      if (g) held_.push_back(*g);
      if (extra) held_.push_back(*extra);
      held_.insert(held_.end(), states.begin(), states.end());
      held_.insert(held_.end(), scales.begin(), scales.end());
    }
  }

  // The scalars and the gradients of the step to come.
  void bring(const py::list& scalars) {
    scalars_.clear();
    for (const py::handle& item : scalars) {
      const auto row = numbers_of(item);
      scalars_.insert(scalars_.end(), row.begin(), row.end());
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Live& live = watch_.live(slots_[i].slot);
      if (live.scalars < 0 || size_t(live.scalars) >= scalars.size())
        throw py::index_error("no row of scalars for a tensor");
      rows_[i].scalars = live.scalars;
      if (slots_[i].own_gradient) rows_[i].g = live.g;
    }
  }

  // Gradients are multiplied by `factor`; where that is negative, nothing is done.
  void run(double factor) {
    if (factor < 0) return;
    for (size_t i = kGradFactor; i < scalars_.size(); i += kScalars) scalars_[i] *= factor;
    py::gil_scoped_release release;
    step_cpu(rows_.data(), int64_t(rows_.size()), scalars_.data(), isa);
  }

  at::Tensor sum_squares() const {
    double sum;
    {
      py::gil_scoped_release release;
      sum = sum_squares_cpu(rows_.data(), int64_t(rows_.size()));
    }
    return at::scalar_tensor(sum, at::kDouble);
  }

private:
  struct Source {
    size_t slot;
    bool own_gradient;
  };
  const Watch& watch_;
  std::vector<Row> rows_;
  std::vector<double> scalars_;
  std::vector<Source> slots_;
  std::vector<at::Tensor> held_;  // what the addresses in the rows point into
};

#if defined(FUSED_ADAMW_CUDA)
// fused_adamw.launch.Kernels: on the current stream of the current device.
class CudaKernels {
public:
  CudaKernels(at::Device device, const std::string& rule, at::ScalarType p, at::ScalarType g,
              at::ScalarType state, const std::string& master, bool stochastic)
      : variant_{rule_of(rule), format_of(p), format_of(g), format_of(state), master_of(master), stochastic} {
    TORCH_CHECK_NOT_IMPLEMENTED(
        has_cuda(variant_),
        "backend='cuda' steps parameters with a master, stochastic rounding or int8 moments ",
        "where gradients are float32 or of the parameter's dtype and moments are not float16; here they are ",
        at::toString(g), " and ", at::toString(state),
        ": convert them, or use backend='triton', which takes any mix");
    const c10::DeviceGuard guard(device);
    check(check_cuda(variant_));
  }

  void step(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk, const at::Tensor& scalars,
            const at::Tensor& factor) const {
    check(step_cuda(variant_, tables(rows, chunks, chunk), scalars.const_data_ptr<float>(),
                    factor.const_data_ptr<float>(), stream()));
  }

  void sum_squares(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk,
                   const at::Tensor& sums) const {
    check(sum_squares_cuda(variant_, tables(rows, chunks, chunk), sums.mutable_data_ptr<double>(), stream()));
  }

  void scalars(const at::Tensor& hyper, const at::Tensor& steps, const at::Tensor& factor,
               const at::Tensor& scalars) const {
    check(scalars_cuda(variant_, hyper.const_data_ptr<double>(), steps.const_data_ptr<int64_t>(),
                       steps.size(0), factor.const_data_ptr<float>(), scalars.mutable_data_ptr<float>(),
                       stream()));
  }

private:
  static Tables tables(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk) {
    return {rows.const_data_ptr<int64_t>(), chunks.const_data_ptr<int32_t>(), chunks.size(0), chunk};
  }
  static void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
  static void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA error: ") + error);
  }
  const Variant variant_;
};
#endif

// stream_cpu of the bench's arrays.
void stream(const std::vector<at::Tensor>& tensors, size_t written) {
  std::vector<Array> arrays;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.numel() == tensors[0].numel() &&
                          t.numel() % kStreamBlock == 0,
                      "stream takes contiguous CPU tensors of one length, a multiple of ", kStreamBlock);
    arrays.push_back({static_cast<uint64_t*>(t.data_ptr()), t.element_size()});
  }
  TORCH_CHECK_VALUE(arrays.size() <= kMaxArrays, "stream takes up to ", kMaxArrays, " tensors");
  TORCH_CHECK_VALUE(0 < written && written <= arrays.size(), "stream writes 1 to ", arrays.size(),
                    " tensors");
  py::gil_scoped_release release;
  stream_cpu(arrays.data(), int(arrays.size()), int(written), tensors[0].numel() / kStreamBlock);
}

}  // namespace
}  // namespace fused_adamw

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fused_adamw;
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&, const std::vector<bool>&, const py::object&,
                    const std::string&, py::object>())
      .def("poll", &Watch::poll)
      .def("rows", &Watch::rows)
      .def("advance", &Watch::advance)
      .def("upload", &Watch::upload)
      .def("scalars_of", &Watch::scalars_of);
  py::class_<CpuStep>(m, "CpuStep")
      .def(py::init<const Watch&, const py::list&>(), py::keep_alive<1, 2>())
      .def("bring", &CpuStep::bring)
      .def("run", &CpuStep::run)
      .def("sum_squares", &CpuStep::sum_squares);
#if defined(FUSED_ADAMW_CUDA)
  py::class_<CudaKernels>(m, "CudaKernels")
      .def(py::init<at::Device, const std::string&, at::ScalarType, at::ScalarType, at::ScalarType,
                    const std::string&, bool>())
      .def("step", &CudaKernels::step)
      .def("sum_squares", &CudaKernels::sum_squares)
      .def("scalars", &CudaKernels::scalars);
#endif
  m.def("stream", &stream);
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = cpu_isas(); *name; ++name) names.emplace_back(*name);
    return names;
  });
  m.def("use_cpu_isa", [](const std::string& name) {
    for (int i = 0; cpu_isas()[i]; ++i)
      if (name == cpu_isas()[i]) return void(isa = i);
    throw py::value_error("this CPU cannot run " + name);
  });
}
