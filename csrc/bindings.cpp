// The extension module fused_adamw._C: what a step needs of Python's and torch's objects, gathered in C++
// (some 60 ns a tensor), and the CPU launch. The only file that sees torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "step.h"

namespace py = pybind11;

namespace fused_adamw {
namespace {

const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

// nullptr for a tensor without memory of its own (a wrapper subclass); plan.py refuses those by name.
const void* address_of(const at::Tensor& t) { return t.has_storage() ? t.const_data_ptr() : nullptr; }

// All of a gradient that a plan depends on, but its address.
struct Layout {
  at::ScalarType dtype;
  at::Device device;
  c10::DimVector sizes, strides;

  explicit Layout(const at::Tensor& t)
      : dtype(t.scalar_type()), device(t.device()), sizes(t.sizes()), strides(t.strides()) {}
  bool fits(const at::Tensor& t) const {
    return t.layout() == at::kStrided && t.scalar_type() == dtype && t.device() == device &&
           t.sizes() == at::IntArrayRef(sizes) && t.strides() == at::IntArrayRef(strides) && !t.is_conj() &&
           !t.is_neg();
  }
};

struct Slot {  // one entry of a group's "params"
  py::object param;
  int group;
  const void* p;
  Layout p_layout;
  std::optional<Layout> g_layout;  // without a value: no gradient
  const void* g = nullptr;
  float* step = nullptr;
  int scalars = -1;
};

struct Seen {  // one entry of the optimizer's state, held so that its address stays its own
  py::object key, value;
  const void* address;
};

// What the plans of an optimizer were built from. plan.Watch is the same in Python.
class Watch {
public:
  Watch(const py::list& groups, const py::dict& state) : groups_(groups), state_(state) {
    int g = 0;
    for (const py::handle& group : groups) {
      for (const py::handle& param : group["params"].cast<py::list>()) add(param, g);
      ++g;
    }
    walk([this](PyObject* key, PyObject* value, const void* address) {
      seen_.push_back(
          {py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), address});
      return true;
    });
  }

  // Whether the plans still hold: same groups, parameters, states, layouts. Addresses of gradients may
  // change.
  bool poll(const py::list& groups, const py::dict& state) {
    if (groups.ptr() != groups_.ptr() || state.ptr() != state_.ptr()) return false;
    size_t i = 0;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
      PyObject* params = PyDict_GetItem(PyList_GET_ITEM(groups.ptr(), g), params_key_.ptr());
      if (!params || !PyList_Check(params)) return false;
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k, ++i) {
        if (i == slots_.size() || slots_[i].group != g ||
            PyList_GET_ITEM(params, k) != slots_[i].param.ptr() || !same(slots_[i]))
          return false;
      }
    }
    if (i != slots_.size()) return false;
    size_t j = 0;
    const bool all = walk([this, &j](PyObject* key, PyObject* value, const void* address) {
      if (j == seen_.size()) return false;
      const Seen& was = seen_[j++];
      return was.key.ptr() == key && was.value.ptr() == value && was.address == address;
    });
    return all && j == seen_.size();
  }

  // The distinct (group, number of the step to come), and for each slot which of them is its own.
  py::list steps() {
    py::list distinct;
    int first = 0, n = 0, group = -1;
    std::vector<float> counts;
    for (Slot& s : slots_) {
      if (!s.step || !s.g_layout) continue;
      if (s.group != group) {
        group = s.group;
        first = n;
      }
      const float count = *s.step + 1;
      int k = first;
      while (k < n && counts[k] != count) ++k;
      if (k == n) {
        counts.push_back(count);
        distinct.append(py::make_tuple(group, count));
        ++n;
      }
      s.scalars = k;
    }
    return distinct;
  }

  void advance() {
    for (Slot& s : slots_)
      if (s.step && s.g_layout) ++*s.step;
  }

  int scalars_of(size_t slot) const { return slots_.at(slot).scalars; }
  const Slot& slot(size_t i) const { return slots_.at(i); }

private:
  void add(py::handle param, int group) {
    const at::Tensor* p = tensor_of(param.ptr());
    if (!p) throw py::type_error("a parameter is no tensor");
    Slot s{py::reinterpret_borrow<py::object>(param), group, address_of(*p), Layout(*p)};
    const at::Tensor& grad = p->unsafeGetTensorImpl()->grad();
    if (grad.defined()) {
      s.g_layout.emplace(grad);
      s.g = address_of(grad);
    }
    if (PyObject* own = PyDict_GetItem(state_.ptr(), param.ptr())) {
      if (PyObject* step = PyDict_GetItemString(own, "step")) {
        const at::Tensor* t = tensor_of(step);
        if (t && t->is_cpu() && t->scalar_type() == at::kFloat && t->numel() == 1)
          s.step = t->mutable_data_ptr<float>();
      }
    }
    slots_.push_back(std::move(s));
  }

  static bool same(Slot& s) {
    const at::Tensor& p = THPVariable_Unpack(s.param.ptr());
    if (address_of(p) != s.p || !s.p_layout.fits(p)) return false;
    const at::Tensor& grad = p.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return !s.g_layout;
    if (!s.g_layout || !s.g_layout->fits(grad)) return false;
    s.g = address_of(grad);
    return s.g || grad.numel() == 0;
  }

  // Every (key, value, address) of the state and of the dicts in it, in the dicts' order, until `visit` says
  // no.
  template <typename Visit> bool walk(const Visit& visit) const {
    PyObject *key, *value, *name, *item;
    for (Py_ssize_t i = 0; PyDict_Next(state_.ptr(), &i, &key, &value);) {
      if (!visit(key, value, nullptr)) return false;
      if (!PyDict_Check(value)) continue;
      for (Py_ssize_t j = 0; PyDict_Next(value, &j, &name, &item);) {
        const at::Tensor* t = tensor_of(item);
        if (!visit(name, item, t ? address_of(*t) : nullptr)) return false;
      }
    }
    return true;
  }

  py::list groups_;
  py::dict state_;
  py::str params_key_{"params"};
  std::vector<Slot> slots_;
  std::vector<Seen> seen_;
};

Format format_of(at::ScalarType dtype) {
  switch (dtype) {
  case at::kFloat: return Format::f32;
  case at::kDouble: return Format::f64;
  case at::kBFloat16: return Format::bf16;
  case at::kHalf: return Format::f16;
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

int best_isa() {
  int last = 0;
  while (cpu_isas()[last + 1]) ++last;
  return last;
}
int isa = best_isa();

// The rows of one launch on the CPU.
class CpuStep {
public:
  // rows: (slot, rule, p, gradient or None where the slot's own is read, states) of dense tensors.
  CpuStep(const Watch& watch, const py::list& rows) : watch_(watch) {
    for (const py::handle& item : rows) {
      const auto [slot, rule, p, g, states] = item.cast<
          std::tuple<size_t, std::string, at::Tensor, std::optional<at::Tensor>, std::vector<at::Tensor>>>();
      Row row{};
      row.p = p.mutable_data_ptr();
      row.numel = p.numel();
      row.p_format = format_of(p.scalar_type());
      row.rule = rule_of(rule);
      row.g = g ? g->const_data_ptr() : nullptr;
      row.g_format = format_of(c10::toRealValueType(g ? g->scalar_type() : watch.slot(slot).g_layout->dtype));
      for (size_t j = 0; j < states.size(); ++j) row.state[j] = states[j].mutable_data_ptr();
      row.state_format = states.empty() ? row.p_format : format_of(states[0].scalar_type());
      rows_.push_back(row);
      slots_.push_back({slot, !g});
      held_.push_back(p);
      if (g) held_.push_back(*g);
      held_.insert(held_.end(), states.begin(), states.end());
    }
  }

  void run(const std::vector<std::vector<double>>& scalars) {
    std::vector<double> flat;
    for (const auto& row : scalars) {
      if (row.size() != kScalars) throw py::value_error("a row of scalars has 8 numbers");
      flat.insert(flat.end(), row.begin(), row.end());
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Slot& slot = watch_.slot(slots_[i].slot);
      rows_[i].scalars = slot.scalars;
      if (slots_[i].own_gradient) rows_[i].g = slot.g;
    }
    py::gil_scoped_release release;
    step_cpu(rows_.data(), int64_t(rows_.size()), flat.data(), isa);
  }

private:
  struct Source {
    size_t slot;
    bool own_gradient;
  };
  const Watch& watch_;
  std::vector<Row> rows_;
  std::vector<Source> slots_;
  std::vector<at::Tensor> held_;  // what the addresses in the rows point into
};

}  // namespace
}  // namespace fused_adamw

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fused_adamw;
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&>())
      .def("poll", &Watch::poll)
      .def("steps", &Watch::steps)
      .def("advance", &Watch::advance)
      .def("scalars_of", &Watch::scalars_of);
  py::class_<CpuStep>(m, "CpuStep")
      .def(py::init<const Watch&, const py::list&>(), py::keep_alive<1, 2>())
      .def("__call__", &CpuStep::run);
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
