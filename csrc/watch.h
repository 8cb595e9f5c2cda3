// What the plans of an optimizer were built from: its groups, parameters, gradients and states. Each step
// polls whether they are still the same, which takes some 60 ns for a parameter. watch.Watch does the same in
// Python.
#pragma once

#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "group_options.h"
#include "step.h"
#include "torch_objects.h"

namespace fused_adamw {

struct ParamEntry {  // one entry of a group's "params"
  py::object param;
  int group;
  Py_ssize_t position;  // in the list
  bool wrapper;         // it wraps other tensors, as a DTensor does
  const void* address;
  uint64_t layout, grad_layout = 0;  // 0: no gradient
  ObjectAddresses objects, grad_objects;
  const void* autograd = nullptr;  // its autograd metadata, to prefetch
  py::object grad_spec;            // the spec of a gradient that is a DTensor
};

struct StepInputs {  // what a step reads and writes of a parameter, close together in memory
  const void* grad = nullptr;
  float* step = nullptr;  // nullptr: the parameter is not stepped, or its steps are counted on the device
  int group = -1;
  int scalars = -1;  // index of its row of scalars
};

struct StateEntry {       // one entry of a parameter's state
  py::object key, value;  // held, so that no other object gets their addresses
  bool plain;             // a tensor of torch's own type, and no wrapper
  const void* address;
  uint64_t layout;  // 0 for anything but a tensor
  ObjectAddresses objects;
};

struct ParamState {  // one entry of the optimizer's state
  py::object key, value;
  Py_ssize_t position;  // in the dict
  const void* keys;     // of the value, a dict; to prefetch
  size_t first, last;   // its entries among all state entries
};

class Watch {
public:
  // on_device: for each parameter, whether its steps are counted there. plan_key, hyper: see GroupOptions.
  // plan_key refers to the optimizer and is passed to each call: kept here, it would make a cycle that the
  // garbage collector does not see, because the optimizer keeps this object.
  Watch(const py::list& groups, const py::dict& state, const std::vector<bool>& on_device,
        const py::object& plan_key, const std::string& family, py::object hyper)
      : groups_(groups), state_(state), hyper_(std::move(hyper)), adam_(family == "adam") {
    for (const py::handle& group : groups) {
      const auto params = group["params"].cast<py::list>();
      options_.emplace_back(group.ptr(), plan_key);
      for (size_t k = 0; k < params.size(); ++k)
        add_param(params[k], on_device.at(params_.size()), Py_ssize_t(k));
    }
    PyObject *key, *value;
    for (Py_ssize_t i = 0, position = 0; PyDict_Next(state.ptr(), &i, &key, &value); position = i)
      add_state(key, value, position);
  }

  // Whether the plans are still right: groups, parameters, states and layouts are the same. Gradients may
  // have moved.
  bool poll(const py::list& groups, const py::dict& state, const py::object& plan_key) {
    if (groups.ptr() != groups_.ptr() || state.ptr() != state_.ptr() || groups.size() != options_.size() ||
        state.size() != states_.size())
      return false;
    std::vector<PyObject*> lists(groups.size());
    size_t n = 0;
    for (size_t g = 0; g < lists.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), g);
      if (!PyDict_Check(group) || !options_[g].is_current(group, plan_key)) return false;
      lists[g] = PyDict_GetItem(group, params_key_.ptr());
      if (!lists[g] || !PyList_Check(lists[g])) return false;
      n += PyList_GET_SIZE(lists[g]);
    }
    if (n != params_.size()) return false;
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) {
        const ParamEntry& next = params_[i + kAhead];
        next.objects.prefetch(ObjectAddresses::kGradientBytes);
        next.grad_objects.prefetch(sizeof(at::TensorImpl));
        FUSED_PREFETCH(next.autograd);
      }
      ParamEntry& entry = params_[i];
      PyObject* const list = lists[entry.group];
      if (entry.position >= PyList_GET_SIZE(list) ||
          PyList_GET_ITEM(list, entry.position) != entry.param.ptr() || !unchanged(entry, inputs_[i]))
        return false;
    }
    for (size_t i = 0; i < states_.size(); ++i)
      if (!unchanged_state(i)) return false;
    return true;
  }

  // Returns the rows of scalars of the coming step, one for each distinct (group, step), and notes for each
  // parameter the index of its row.
  py::list scalar_rows() {
    py::list rows;
    int first = 0, n = 0, group = -1;
    std::vector<float> counts;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (i + kAhead < inputs_.size()) FUSED_PREFETCH(inputs_[i + kAhead].step);
      StepInputs& inputs = inputs_[i];
      if (!inputs.step) continue;
      if (inputs.group != group) {
        group = inputs.group;
        first = n;
      }
      const float count = *inputs.step + 1;
      int k = first;
      while (k < n && counts[k] != count) ++k;
      if (k == n) {
        PyObject* const options = PyList_GET_ITEM(groups_.ptr(), group);
        counts.push_back(count);
        rows.append(adam_ ? options_[group].scalar_row<true>(options, hyper_, count)
                          : options_[group].scalar_row<false>(options, hyper_, count));
        ++n;
      }
      inputs.scalars = k;
    }
    return rows;
  }

  // Counts the step, and tells autograd that the parameters have changed.
  void advance() {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (i + kAhead < params_.size()) params_[i + kAhead].objects.prefetch_version();
      if (params_[i].grad_layout) bump_version(params_[i].param.ptr());
      if (inputs_[i].step) ++*inputs_[i].step;
    }
  }

  // Brings the tables of a launch on a device to this step in one copy: the rows, if any changed or
  // `all_rows` is set, and the rows of scalars, which follow them in `buffer`. `table` is a copy of the rows
  // on the host. `slots` has the parameter of each row, or -1 - parameter where COL_GRAD stays as it is.
  // COL_SCALARS stays as it is where steps are counted on the device. torch's caching allocator of pinned
  // memory does not hand the staging memory out again before the copy is done; a graph, which copies from it
  // at each replay, brings its own.
  void upload(const at::Tensor& table, const at::Tensor& slots, const py::list& scalar_rows,
              const at::Tensor& buffer, bool all_rows, const std::optional<at::Tensor>& own_staging) const {
    const bool rows = update(table, slots) || all_rows;
    const size_t n = scalar_rows.size(), start = rows ? 0 : table.nbytes();
    const size_t bytes = table.nbytes() - start + n * SCALARS * sizeof(float);
    if (!bytes) return;
    const at::Tensor staging =
        own_staging
            ? *own_staging
            : at::empty({int64_t(bytes)}, at::TensorOptions(at::kByte).pinned_memory(buffer.is_cuda()));
    char* to = static_cast<char*>(staging.mutable_data_ptr());
    if (rows) to = std::copy_n(static_cast<const char*>(table.const_data_ptr()), table.nbytes(), to);
    for (const py::handle& row : scalar_rows) {
      const auto values = scalar_row_of(row);
      for (int i = 0; i < SCALARS; ++i, to += sizeof(float)) {
        const float value = float(values[i]);
        std::memcpy(to, &value, sizeof(value));
      }
    }
    buffer.narrow(0, int64_t(start), int64_t(bytes)).copy_(staging, /*non_blocking=*/true);
  }

  int scalars_of(size_t slot) const { return inputs_.at(slot).scalars; }
  const at::Tensor& grad(size_t slot) const {
    return THPVariable_Unpack(params_.at(slot).param.ptr()).unsafeGetTensorImpl()->grad();
  }
  const StepInputs& inputs(size_t slot) const { return inputs_.at(slot); }

private:
  // Returns whether any row changed.
  bool update(const at::Tensor& table, const at::Tensor& slots) const {
    int64_t* row = table.mutable_data_ptr<int64_t>();
    const int64_t* const slot = slots.const_data_ptr<int64_t>();
    bool changed = false;
    const auto set = [&changed](int64_t& to, int64_t value) {
      changed |= to != value;
      to = value;
    };
    for (int64_t i = 0; i < table.size(0); ++i, row += COLUMNS) {
      const StepInputs& inputs = inputs_.at(slot[i] < 0 ? -1 - slot[i] : slot[i]);
      if (slot[i] >= 0) set(row[COL_GRAD], reinterpret_cast<int64_t>(inputs.grad));
      if (inputs.step) set(row[COL_SCALARS], inputs.scalars);
      const int64_t addresses = row[COL_PARAM] | row[COL_GRAD] | row[COL_STATE] | row[COL_STATE + 1] |
                                row[COL_STATE + 2] | row[COL_EXTRA] | row[COL_SCALES] | row[COL_SCALES + 1];
      const int64_t shard_aligned = row[COL_FLAGS] & SHARD_ALIGNED;
      set(row[COL_FLAGS], shard_aligned | (shard_aligned && addresses % 16 == 0 ? ALIGNED : 0));
    }
    return changed;
  }

  void add_param(py::handle param, bool on_device, Py_ssize_t position) {
    const int group = int(options_.size()) - 1;
    const at::Tensor* owner = tensor_of(param.ptr());
    if (!owner)
      throw py::type_error("entry " + std::to_string(position) + " of a group's params is no tensor");
    const Local p = local_of(*owner, param.ptr());
    ParamEntry entry{py::reinterpret_borrow<py::object>(param),
                     group,
                     position,
                     is_wrapper(*owner),
                     address_of(*p),
                     layout_of(*p)};
    const at::Tensor& grad = owner->unsafeGetTensorImpl()->grad();
    StepInputs inputs;
    inputs.group = group;
    entry.objects = ObjectAddresses(param.ptr(), p);
    entry.autograd = owner->unsafeGetTensorImpl()->autograd_meta();
    if (grad.defined()) {
      const Local g = local_of(grad);
      entry.grad_objects = ObjectAddresses(g.dtensor, g);
      entry.grad_layout = layout_of(*g);
      entry.grad_spec = py::reinterpret_borrow<py::object>(g.spec);
      inputs.grad = address_of(*g);
    }
    if (grad.defined() && !on_device) {
      PyObject* param_state = PyDict_GetItem(state_.ptr(), param.ptr());
      PyObject* step = param_state ? PyDict_GetItemString(param_state, "step") : nullptr;
      const at::Tensor* t = step ? tensor_of(step) : nullptr;
      if (!t || !t->is_cpu() || t->scalar_type() != at::kFloat || t->numel() != 1)
        throw py::value_error("a parameter has no 'step', a float32 tensor of one element on the CPU");
      inputs.step = t->mutable_data_ptr<float>();
    }
    inputs_.push_back(inputs);
    params_.push_back(std::move(entry));
  }

  void add_state(PyObject* key, PyObject* value, Py_ssize_t position) {
    const size_t first = state_entries_.size();
    PyObject *name, *item;
    for (Py_ssize_t i = 0; PyDict_Check(value) && PyDict_Next(value, &i, &name, &item);) {
      const at::Tensor* tensor = tensor_of(item);
      const Local t = tensor ? local_of(*tensor, item) : Local();
      const bool plain = tensor && THPVariable_CheckExact(item) && !is_wrapper(*tensor);
      state_entries_.push_back({py::reinterpret_borrow<py::object>(name),
                                py::reinterpret_borrow<py::object>(item), plain,
                                tensor ? address_of(*t) : nullptr, tensor ? layout_of(*t) : 0,
                                tensor ? ObjectAddresses(item, t) : ObjectAddresses()});
    }
    states_.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value),
                       position, PyDict_Check(value) ? keys_of(value) : nullptr, first,
                       state_entries_.size()});
  }

  // Takes the address of a gradient that moved.
  static bool unchanged(ParamEntry& entry, StepInputs& inputs) {
    const at::Tensor& owner = THPVariable_Unpack(entry.param.ptr());
    if (!entry.wrapper && is_wrapper(owner)) return false;
    const Local p = local_of(owner, entry.param.ptr());
    if (address_of(*p) != entry.address || layout_of(*p) != entry.layout) return false;
    const at::Tensor& grad = owner.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return !entry.grad_layout;
    if (!entry.wrapper && is_wrapper(grad)) return false;
    const Local g = local_of(grad);
    if (layout_of(*g) != entry.grad_layout || !unchanged_spec(entry, g)) return false;
    inputs.grad = address_of(*g);
    if (entry.grad_objects.impl != g->unsafeGetTensorImpl())
      entry.grad_objects = ObjectAddresses(g.dtensor, g);
    return inputs.grad || g->numel() == 0;
  }

  static bool unchanged_spec(ParamEntry& entry, const Local& g) {
    if (g.spec == entry.grad_spec.ptr()) return true;
    if (!g.spec || !entry.grad_spec) return false;
    auto spec = py::reinterpret_borrow<py::object>(g.spec);
    for (const char* name : {"mesh", "placements"})
      if (!spec.attr(name).equal(entry.grad_spec.attr(name))) return false;
    entry.grad_spec = std::move(spec);
    return true;
  }

  bool unchanged_state(size_t i) const {
    if (i + kAhead < states_.size()) {
      const ParamState& next = states_[i + kAhead];
      prefetch(next.value.ptr(), ObjectAddresses::kPythonBytes);
      prefetch(next.keys, kKeysBytes);
      for (size_t j = next.first; j < next.last; ++j) state_entries_[j].objects.prefetch(0);
    }
    const ParamState& state = states_[i];
    PyObject *key, *value, *item;
    Py_ssize_t position = state.position;
    if (!PyDict_Next(state_.ptr(), &position, &key, &value) || key != state.key.ptr() ||
        value != state.value.ptr())
      return false;
    size_t j = state.first;
    for (Py_ssize_t k = 0; PyDict_Check(value) && PyDict_Next(value, &k, &key, &item); ++j) {
      if (j == state.last || key != state_entries_[j].key.ptr() || item != state_entries_[j].value.ptr())
        return false;
      const StateEntry& entry = state_entries_[j];
      if (!entry.layout) continue;
      const at::Tensor& tensor = THPVariable_Unpack(item);
      if (entry.plain && is_wrapper(tensor)) return false;
      const Local t = entry.plain ? Local{&tensor} : local_of(tensor, item);
      if (entry.address != address_of(*t) || entry.layout != layout_of(*t)) return false;
    }
    return j == state.last;
  }

  py::list groups_;
  py::dict state_;
  py::str params_key_{"params"};
  py::object hyper_;
  bool adam_;
  std::vector<GroupOptions> options_;
  std::vector<ParamEntry> params_;
  std::vector<StepInputs> inputs_;  // of the same parameters
  std::vector<ParamState> states_;
  std::vector<StateEntry> state_entries_;
};

}  // namespace fused_adamw
