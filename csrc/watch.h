// Follows the tensors that plans were built from: groups, parameters, gradients and states. Each step polls
// whether the plans still hold, and takes the addresses of tensors that moved. That takes 65 ns for a
// parameter whose objects are in the L2 cache, and 400 where they are in no cache (AMD EPYC of 2022).
// watch.Watch does the same in Python.
//
// A watch owns no tensor, dict or list. A poll reads the live objects out of the live containers, and
// compares what a launch depends on. Pointers to objects are compared, never followed, so it does no harm if
// another object has come to lie where one was: its contents are compared too.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "group_options.h"
#include "step.h"
#include "threads_cpu.h"
#include "torch_objects.h"

namespace fused_adamw {

// The addresses of a row in the order of its columns, without those between them.
constexpr int kAddresses = COL_NUMEL + COL_SEED - COL_EXTRA;
constexpr int column_of(int k) { return k < COL_NUMEL ? k : k - COL_NUMEL + COL_EXTRA; }
constexpr int address_index(int column) {
  return column < COL_NUMEL ? column : column - COL_EXTRA + COL_NUMEL;
}

struct StepInputs {  // what a step reads and writes of a parameter, close together in memory
  std::array<const void*, kAddresses> addresses{};
  const void* step = nullptr;  // the address of its counter
  int group = 0;
  int scalars = -1;               // index of its row of scalars
  bool live = false;              // it is in a plan and has a gradient: this step moves it
  bool counts_on_device = false;  // the step is counted where the parameter is
};

class Watch {
public:
  // rows: a list of contract.Row. only: the group and the position of each parameter that is watched, in
  // ascending order, or None for all. previous: a watch, or None, that may have seen gradients that are
  // missing now. plan_key, hyper: see GroupOptions. plan_key refers to the optimizer and is passed to each
  // call: kept here, it would make a cycle that the garbage collector does not see, because the optimizer
  // keeps this object.
  Watch(const py::list& groups, const py::dict& state, const py::list& rows, const py::object& plan_key,
        const std::string& family, py::object hyper, const Watch* previous,
        const std::optional<std::vector<std::pair<size_t, Py_ssize_t>>>& only)
      : hyper_(std::move(hyper)), adam_(family != "sgd"), partial_(only),
        layouts_(previous ? previous->layouts_ : std::make_shared<Layouts>()) {
    if (partial_) {
      first_ = only->front().first;
      std::vector<std::vector<Py_ssize_t>> positions(groups.size());
      for (const auto& [group, position] : *only) positions.at(group).push_back(position);
      for (size_t g = first_; g <= only->back().first; ++g)
        add_group(py::object(groups[g]), plan_key, &positions[g]);
    } else {
      for (const py::handle& group : groups) add_group(group, plan_key, nullptr);
    }
    size_t before = 0;
    for (size_t g = 0; g < first_ + options_.size(); ++g) {
      if (g >= first_) offsets_.push_back(before);
      before += py::len(groups[g]["params"]);
    }
    std::unordered_map<PyObject*, Py_ssize_t> positions;  // in the state, a dict
    PyObject *key, *value;
    for (Py_ssize_t i = 0, position = 0; PyDict_Next(state.ptr(), &i, &key, &value); position = i)
      positions[key] = position;
    for (const py::handle& row : rows) add_row(row, state, positions, previous);
    moved_ = false;  // parameters that share memory now have launches of their own
  }

  // Whether the plans still hold: no parameter, state or layout is another, and no gradient is where none was
  // planned. Takes the addresses of tensors that moved, and which gradients there are.
  bool poll(const py::list& groups, const py::dict& state, const py::object& plan_key) {
    // First, because plans of other groups may be polled before these.
    std::vector<py::object> lists;
    if (!read_lists(groups, lists)) return false;
    // plan_key is Python code, which may change what was read.
    for (size_t g = first_; g < lists.size(); ++g) {
      if (g >= groups.size()) return false;
      const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), g));
      if (!PyDict_Check(group.ptr()) || !options_[g - first_].is_current(group.ptr(), plan_key)) return false;
    }
    return poll_tensors(groups, state);
  }

  // The part of poll() that runs no Python code, but for DTensors of other specs.
  bool poll_tensors(const py::list& groups, const py::dict& state) {
    std::vector<py::object> lists;
    if (!read_lists(groups, lists)) return false;
    const uint64_t version = version_of(state.ptr());
    if (version != state_version_) state_version_ = 0;  // entries are read anew, maybe not all of them
    if (!followed_by_threads(lists, state) && !follow_part<false>(0, params_.size(), lists, state))
      return false;
    if (moved_ && overlaps()) return false;
    state_version_ = version;
    moves_ += moved_;
    moved_ = false;
    return true;
  }

  // Returns the rows of scalars of the coming step, one for each distinct (group, step), and notes for each
  // parameter the index of its row.
  py::list scalar_rows(const py::list& groups) {
    py::list rows;
    read_hypers(groups);
    for_scalar_rows([&rows](const std::array<double, SCALARS>& values) {
      py::tuple row(size_t{SCALARS});
      for (int i = 0; i < SCALARS; ++i) PyTuple_SET_ITEM(row.ptr(), i, PyFloat_FromDouble(values[i]));
      rows.append(row);
    });
    return rows;
  }

  // Reads the numbers of the groups that are stepped; returns whether Python code ran for it.
  bool read_hypers(const py::list& groups) {
    bool ran = false;
    int group = -1;
    for (const StepInputs& inputs : inputs_) {
      if (inputs.group == group || !inputs.live || inputs.counts_on_device) continue;
      group = inputs.group;
      if (size_t(group) >= groups.size()) throw py::index_error("a group went while it was stepped");
      const auto options = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), group));
      ran |= options_[group - first_].read(options.ptr(), hyper_);
    }
    return ran;
  }

  // Brings the numbers of some groups that changed to their rows of `values`, and addresses of learning rates
  // that are tensors on `device` to `rates`, as scalars_cuda takes them, without a look at their values.
  // Returns whether anything changed, and which of the groups have a rate that no kernel there can read.
  std::pair<bool, std::vector<size_t>> device_hypers(const py::list& groups, const std::vector<size_t>& some,
                                                     const at::Tensor& values, const at::Tensor& rates,
                                                     at::Device device) {
    bool changed = false;
    std::vector<size_t> unreadable;
    const auto set = [&changed](auto& to, auto value) {
      changed |= to != value;
      to = value;
    };
    for (const size_t g : some) {
      if (g >= groups.size()) continue;  // of a captured graph, which may have more groups than there are now
      const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), g));
      GroupOptions& options = options_.at(g - first_);
      options.forget_changed(group.ptr());
      try {
        options.read(group.ptr(), hyper_, /*on_host=*/false);
      } catch (const py::error_already_set& error) {
        const bool of_values = error.matches(PyExc_KeyError) || error.matches(PyExc_TypeError) ||
                               error.matches(PyExc_ValueError);
        if (!of_values || has_gradient(group)) throw;
        continue;  // nobody reads the options of a group without gradients
      }
      double* const row = values.mutable_data_ptr<double>() + g * HYPERS;
      const at::Tensor* const lr = GroupOptions::rate_of(group.ptr());
      const bool on_device = lr && !lr->is_cpu();
      for (int i = 0; i < HYPERS; ++i)
        set(row[i], i == HYPER_LR && on_device ? options.lr_mult() : options.numbers()[i]);
      int64_t rate = 0;
      if (on_device) {
        const bool is_float = lr->scalar_type() == at::kFloat;
        if (lr->device() != device || !(is_float || lr->scalar_type() == at::kDouble) || is_wrapper(*lr)) {
          unreadable.push_back(g);
          continue;
        }
        const auto address = reinterpret_cast<int64_t>(lr->const_data_ptr());
        rate = is_float ? ~address : address;
      }
      set(rates.mutable_data_ptr<int64_t>()[g], rate);
    }
    return {changed, unreadable};
  }

  // Hands the same rows to add(row).
  template <class F> void for_scalar_rows(const F& add) {
    int first = 0, n = 0, group = -1, k = 0;
    std::vector<float> counts;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (i + kFarAhead < inputs_.size()) FUSED_PREFETCH(inputs_[i + kFarAhead].step);
      StepInputs& inputs = inputs_[i];
      if (!inputs.live || inputs.counts_on_device) continue;
      if (inputs.group != group) {
        group = inputs.group;
        first = k = n;
      }
      const float count = *static_cast<const float*>(inputs.step) + 1;
      if (k == n || counts[k] != count)
        for (k = first; k < n && counts[k] != count;) ++k;
      if (k == n) {
        const GroupOptions& options = options_[group - first_];
        counts.push_back(count);
        add(adam_ ? options.scalar_row<true>(count) : options.scalar_row<false>(count));
        ++n;
      }
      inputs.scalars = k;
    }
  }

  // Lets polls use the threads of the CPU backend, which are to be awake for its update in any case.
  void share() { shared_ = true; }

  // Counts the step, and tells autograd that the parameters have changed. To be called with the GIL held
  // since the poll, or with the tensors held.
  void advance() const {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (i + kFarAhead < params_.size()) {
        const ParamEntry& next = params_[i + kFarAhead];
        next.seen.objects.prefetch_version();
        FUSED_PREFETCH(next.version);
        FUSED_PREFETCH(inputs_[i + kFarAhead].step);
      }
      if (!inputs_[i].live) continue;
      bump_version(const_cast<PyObject*>(params_[i].param));
      if (!inputs_[i].counts_on_device) ++*static_cast<float*>(const_cast<void*>(inputs_[i].step));
    }
  }

  // Whether the last poll saw a gradient.
  bool any_live() const {
    return std::any_of(inputs_.begin(), inputs_.end(), [](const StepInputs& inputs) { return inputs.live; });
  }
  int scalars_of(size_t slot) const { return inputs_.at(slot).scalars; }
  const StepInputs& inputs(size_t slot) const { return inputs_.at(slot); }
  // Changes whenever the address of a parameter or a state does.
  int64_t moves() const { return moves_; }
  // Holds the memory that a step reads and writes.
  std::vector<c10::intrusive_ptr<at::StorageImpl>> hold() const {
    std::vector<c10::intrusive_ptr<at::StorageImpl>> held;
    const auto add = [&held](const Seen& seen) {
      auto* const storage = static_cast<at::StorageImpl*>(const_cast<void*>(seen.objects.storage));
      if (storage) held.push_back(c10::intrusive_ptr<at::StorageImpl>::reclaim_copy(storage));
    };
    for (size_t i = 0; i < params_.size(); ++i) {
      if (!inputs_[i].live) continue;
      add(params_[i].seen);
      add(params_[i].grad);
      for (size_t j = params_[i].first; j < params_[i].last; ++j) add(state_entries_[j].seen);
    }
    return held;
  }

private:
  struct ParamEntry {  // one entry of a group's "params"
    const PyObject* param;
    Py_ssize_t position;            // in the list
    const void* grad_at = nullptr;  // where its gradient is kept, to prefetch
    const void* version = nullptr;  // its counter of changes, to prefetch
    const void* address = nullptr;
    bool planned = false;   // it has a row
    bool p_copied = false;  // the launch steps a copy of it
    bool g_copied = false;  // the launch reads a copy of its gradient
    Seen seen, grad;        // of a gradient that is missing: as one was, or as the parameter is
    // Where it has a row:
    PyObject* own = nullptr;      // its state, a dict, while the optimizer's state has state_version_
    uint64_t own_version = 0;     // of that dict when its values were last read
    Py_ssize_t own_position = 0;  // in the optimizer's state
    size_t first = 0, last = 0;   // its entries among all state entries
  };
  struct StateEntry {           // one entry of a planned parameter's state
    py::object key;             // nullptr if it is no string, and may hold a tensor
    int column;                 // of the row, or one of these
    PyObject* value = nullptr;  // a tensor, while its dict has own_version
    Seen seen;
  };
  enum { NO_COLUMN = -1, STEP_COLUMN = -2 };

  // Reads the groups' lists of parameters; returns whether they are as long as they were, and begin alike.
  bool read_lists(const py::list& groups, std::vector<py::object>& lists) const {
    if (groups.size() < first_ + options_.size() || (!partial_ && groups.size() != options_.size()))
      return false;
    lists.reserve(first_ + options_.size());
    size_t before = 0;
    for (size_t g = 0; g < first_ + options_.size(); ++g) {
      PyObject* const group = PyList_GET_ITEM(groups.ptr(), g);
      PyObject* const list = PyDict_Check(group) ? PyDict_GetItem(group, params_key_.ptr()) : nullptr;
      if (!list || !PyList_Check(list)) return false;
      lists.push_back(py::reinterpret_borrow<py::object>(list));
      if (partial_ && g >= first_ && before != offsets_[g - first_]) return false;
      before += PyList_GET_SIZE(list);
    }
    if (!partial_ && before != params_.size()) return false;
    return params_.empty() || param_at(0, lists) == params_[0].param;
  }

  static bool has_gradient(const py::object& group) {
    for (const py::handle& item : group["params"]) {
      const at::Tensor* const p = tensor_of(item.ptr());
      if (p && p->unsafeGetTensorImpl()->grad().defined()) return true;
    }
    return false;
  }

  PyObject* param_at(size_t i, const std::vector<py::object>& lists) const {
    PyObject* const list = lists[inputs_[i].group].ptr();
    const Py_ssize_t position = params_[i].position;
    return position < PyList_GET_SIZE(list) ? PyList_GET_ITEM(list, position) : nullptr;
  }

  void add_group(py::handle group, const py::object& plan_key, const std::vector<Py_ssize_t>* only) {
    const auto params = group["params"].cast<py::list>();
    options_.emplace_back(group.ptr(), plan_key);
    const size_t n = only ? only->size() : params.size();
    for (size_t i = 0; i < n; ++i) {
      const Py_ssize_t k = only ? (*only)[i] : Py_ssize_t(i);
      if (k >= Py_ssize_t(params.size())) throw py::index_error("a group has fewer params");
      PyObject* const param = PyList_GET_ITEM(params.ptr(), k);
      const at::Tensor* const p = tensor_of(param);
      if (!p) throw py::type_error("entry " + std::to_string(k) + " of a group's params is no tensor");
      ParamEntry entry{param, k};
      entry.seen.objects = ObjectAddresses(param, local_of(*p, param));
      params_.push_back(std::move(entry));
      inputs_.emplace_back();
      inputs_.back().group = int(first_ + options_.size()) - 1;
    }
  }

  void add_row(py::handle row, const py::dict& state,
               const std::unordered_map<PyObject*, Py_ssize_t>& positions, const Watch* previous) {
    const auto slot = row.attr("slot").cast<size_t>();
    ParamEntry& entry = params_.at(slot);
    StepInputs& inputs = inputs_[slot];
    PyObject* const param = const_cast<PyObject*>(entry.param);
    const at::Tensor& p = *tensor_of(param);
    entry.planned = true;
    entry.seen = Seen(*layouts_, p, param);
    const at::Tensor& grad = p.unsafeGetTensorImpl()->grad();
    const Seen* const before =
        previous && row.attr("as_before").cast<bool>() ? previous->grad_of(param) : nullptr;
    entry.grad = grad.defined() ? Seen(*layouts_, grad) : before ? *before : entry.seen;
    const auto copy = [&row, &inputs](const char* name, int column) {
      const auto tensor = row.attr(name).cast<std::optional<at::Tensor>>();
      if (tensor) inputs.addresses[column] = tensor->const_data_ptr();
      return tensor.has_value();
    };
    entry.p_copied = copy("p_copy", COL_PARAM);
    entry.g_copied = copy("g_copy", COL_GRAD);
    inputs.counts_on_device = row.attr("counts_on_device").cast<bool>();
    if (!follow(entry, inputs, param)) throw py::value_error("the memory of a parameter is gone");

    const auto position = positions.find(param);
    if (position == positions.end()) throw py::value_error("a parameter of a plan has no state");
    PyObject* const own = PyDict_GetItem(state.ptr(), param);
    const py::dict columns = row.attr("columns");
    entry.own_position = position->second, entry.first = state_entries_.size();
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Check(own) && PyDict_Next(own, &i, &key, &value);) {
      PyObject* const column = PyDict_GetItem(columns.ptr(), key);
      const bool is_step = PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "step") == 0;
      StateEntry of{{}, column ? int(PyLong_AsLong(column)) : is_step ? STEP_COLUMN : NO_COLUMN, nullptr, {}};
      if (PyUnicode_Check(key)) of.key = py::reinterpret_borrow<py::object>(key);
      if (of.column != NO_COLUMN) {
        const at::Tensor* const tensor = tensor_of(value);
        if (!tensor || (is_step && !inputs.counts_on_device && !is_counter(*tensor)))
          throw py::value_error(
              "a parameter's state is no tensor, or its 'step' no float32 of one element on the CPU");
        of.seen = Seen(*layouts_, *tensor, value);
      }
      state_entries_.push_back(std::move(of));
    }
    entry.last = state_entries_.size();
    if (!follow_state(entry, inputs, state) || !inputs.step)
      throw py::value_error("the memory of a parameter's state is gone, or it has no 'step'");
  }

  static bool is_counter(const at::Tensor& t) {
    return t.is_cpu() && t.scalar_type() == at::kFloat && t.numel() == 1;
  }

  // What was last seen of the gradient of a parameter; nullptr if it is not among those of a plan.
  const Seen* grad_of(const PyObject* param) const {
    if (by_param_.empty())
      for (size_t i = 0; i < params_.size(); ++i)
        if (params_[i].planned) by_param_[params_[i].param] = i;
    const auto found = by_param_.find(param);
    return found == by_param_.end() ? nullptr : &params_[found->second].grad;
  }

  // Follows a long list by all threads. This one holds the GIL and waits; the others only read objects of
  // Python and torch. Returns false where a parameter is not as it was, or has to be followed by this thread:
  // the walk in order then decides.
  bool followed_by_threads(const std::vector<py::object>& lists, const py::dict& state) {
    const int64_t n = params_.size(), elements = n * kElements;
    if (!shared_ || !state_version_ || forked || !are_shared(elements)) return false;
    if (alone_ > 0) {
      --alone_;
      return false;
    }
    const auto start = std::chrono::steady_clock::now();
    std::atomic<bool> followed{true};
    for_each_part(n, elements, [&](int64_t first, int64_t last) {
      try {
        if (!follow_part<true>(first, last, lists, state)) followed = false;
      } catch (...) {  // no exception may leave a thread
        followed = false;
      }
    });
    const auto took = std::chrono::steady_clock::now() - start;
    if (!followed || took > n * std::chrono::nanoseconds(500)) alone_ = kAlone;
    return followed;
  }

  // kPlain, here and below: returns false, too, where Python code, a reference count, an exception or a copy
  // of memory is due, or a parameter or its state has moved.
  template <bool kPlain>
  bool follow_part(size_t first, size_t last, const std::vector<py::object>& lists, const py::dict& state) {
    for (size_t i = first; i < last; ++i) {
      if (i + kAhead < last) prefetch(params_[i + kAhead]);
      PyObject* const param = param_at(i, lists);
      if (param != params_[i].param || !follow<kPlain>(params_[i], inputs_[i], param)) return false;
      if (params_[i].planned && !follow_state<kPlain>(params_[i], inputs_[i], state)) return false;
    }
    return true;
  }

  template <bool kPlain> bool set(const void*& to, const void* address) {
    if (to == address) return true;
    if (kPlain) return false;
    moved_ = true;
    to = address;
    return true;
  }

  template <bool kPlain = false> bool follow(ParamEntry& entry, StepInputs& inputs, PyObject* param) {
    if (kPlain && !THPVariable_CheckExact(param)) return false;
    const at::Tensor* const p = tensor_of(param);
    if (!p) return false;
    const at::TensorImpl& impl = *p->unsafeGetTensorImpl();
    const at::Tensor* const grad = gradient_of(impl);
    entry.grad_at = grad, entry.version = version_counter_of(impl);
    inputs.live = grad && grad->defined();
    if (!entry.planned) return !inputs.live;
    const void *address = nullptr, *grad_address = nullptr;
    if (!entry.seen.follow<true, kPlain>(*p, param, address) || !set<kPlain>(entry.address, address))
      return false;
    if (!entry.p_copied) inputs.addresses[COL_PARAM] = address;
    if (!inputs.live) return true;
    if (!entry.grad.follow<false, kPlain>(*grad, nullptr, grad_address)) return false;
    if (entry.g_copied) return true;
    inputs.addresses[COL_GRAD] = grad_address;
    return !is_shifted(entry, address, grad_address);
  }

  // Whether a gradient lies across its parameter's memory and is not the parameter's own: it is to be
  // refused.
  static bool is_shifted(const ParamEntry& entry, const void* param, const void* grad) {
    const auto p = reinterpret_cast<uintptr_t>(param), g = reinterpret_cast<uintptr_t>(grad);
    return p != g && g < p + entry.seen.reach && p < g + entry.grad.reach && !entry.p_copied;
  }

  FUSED_HD void prefetch(const ParamEntry& next) const {
    next.seen.objects.prefetch();
    next.grad.objects.prefetch();
    FUSED_PREFETCH(next.grad_at);
    if (!next.planned) return;
    fused_adamw::prefetch<sizeof(PyDictObject)>(next.own);
    for (size_t j = next.first; j < next.last; ++j) state_entries_[j].seen.objects.prefetch();
  }

  template <bool kPlain = false>
  bool follow_state(ParamEntry& entry, StepInputs& inputs, const py::dict& state) {
    PyObject *key, *value;
    const uint64_t version = version_of(state.ptr());
    if (!version || version != state_version_) {
      if (kPlain) return false;
      Py_ssize_t position = entry.own_position;
      if (!PyDict_Next(state.ptr(), &position, &key, &entry.own) || key != entry.param ||
          !PyDict_Check(entry.own))
        return false;
    }
    PyObject* const own = entry.own;
    const uint64_t own_version = version_of(own);
    // To follow a DTensor may run Python code, so its values are read one after the other.
    if (own_version && own_version == entry.own_version && !entry.seen.spec) {
      for (size_t j = entry.first; j < entry.last; ++j) {
        StateEntry& of = state_entries_[j];
        if (of.column != NO_COLUMN && !follow_value<kPlain>(of, inputs, THPVariable_Unpack(of.value)))
          return false;
      }
      return true;
    }
    if (kPlain) return false;
    entry.own_version = 0;
    size_t j = entry.first;
    for (Py_ssize_t i = 0; PyDict_Next(own, &i, &key, &value); ++j) {
      if (j == entry.last || !same_key(state_entries_[j].key, key)) return false;
      StateEntry& of = state_entries_[j];
      if (of.column == NO_COLUMN) continue;
      const at::Tensor* const tensor = tensor_of(value);
      if (!tensor) return false;
      of.value = value;
      if (!follow_value<false>(of, inputs, *tensor)) return false;
    }
    if (j != entry.last) return false;
    entry.own_version = own_version;
    return true;
  }

  template <bool kPlain> bool follow_value(StateEntry& entry, StepInputs& inputs, const at::Tensor& tensor) {
    const void* address = nullptr;
    if (!entry.seen.follow<true, kPlain>(tensor, entry.value, address)) return false;
    if (!address && local_of(tensor, entry.value)->numel() != 0) return false;
    return set<kPlain>(
        entry.column == STEP_COLUMN ? inputs.step : inputs.addresses[address_index(entry.column)], address);
  }

  static bool same_key(py::object& seen, PyObject* key) {
    if (seen.ptr() == key || (!seen && !PyUnicode_Check(key))) return true;
    if (!seen || !PyUnicode_Check(key) || !PyUnicode_Check(seen.ptr()) ||
        PyUnicode_Compare(key, seen.ptr()) != 0)
      return false;
    seen = py::reinterpret_borrow<py::object>(key);
    return true;
  }

  // Whether two parameters share memory. Those that did when the plan was built are stepped by launches of
  // their own, so a plan in which any of them moves is built anew.
  bool overlaps() const {
    std::vector<std::pair<const char*, size_t>> spans;
    for (const ParamEntry& entry : params_) {
      if (entry.planned && entry.seen.reach)
        spans.emplace_back(static_cast<const char*>(entry.address), entry.seen.reach);
    }
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); ++i)
      if (spans[i - 1].first + spans[i - 1].second > spans[i].first) return true;
    return false;
  }

  // Lists of more than 512 parameters are followed by all threads. With two idle cores a step of 600 takes 58
  // instead of 76 us; beside other programs, by threads that sleep between regions, 102 instead of 92.
  static constexpr int64_t kElements = 32;
  // So many polls are by one thread after one that threads could not do, or that took longer than one thread
  // takes: where another program has the CPU of a thread, the others wait for it for some milliseconds.
  static constexpr int kAlone = 64;

  py::str params_key_{"params"};
  py::object hyper_;
  bool adam_, partial_;  // partial: not all parameters are watched
  std::shared_ptr<Layouts> layouts_;
  uint64_t state_version_ = 0;   // of the optimizer's state at the last poll that held
  size_t first_ = 0;             // the first group that has a watched parameter
  std::vector<size_t> offsets_;  // how many parameters come before each group, from that on
  bool shared_ = false;          // polls use several threads
  int alone_ = 0;                // how many polls to come use one thread all the same
  bool moved_ = false;           // an address changed since the last poll that held
  int64_t moves_ = 0;
  std::vector<GroupOptions> options_;
  std::vector<ParamEntry> params_;
  std::vector<StepInputs> inputs_;  // of the same parameters
  std::vector<StateEntry> state_entries_;
  mutable std::unordered_map<const PyObject*, size_t> by_param_;
};

}  // namespace fused_adamw
