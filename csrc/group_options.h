// The options of one of the optimizer's groups: whether its plans are still right, and the rows of scalars of
// its steps.
#pragma once

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "scalars.h"
#include "torch_objects.h"

namespace fused_adamw {

// Whether a value cannot change while it stays the same object.
inline bool is_immutable(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_immutable(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return value == Py_None || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         PyUnicode_CheckExact(value) || THPDtype_Check(value);
}

// Converts a row of scalars; pybind's own conversion to a vector takes 7 times as long.
inline std::array<double, SCALARS> scalar_row_of(py::handle row) {
  std::array<double, SCALARS> values;
  if (!PyTuple_Check(row.ptr()) || PyTuple_GET_SIZE(row.ptr()) != SCALARS)
    throw py::value_error("a row of scalars must be a tuple of " + std::to_string(SCALARS) + " numbers");
  for (int i = 0; i < SCALARS; ++i) {
    values[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(row.ptr(), i));
    if (values[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return values;
}

class GroupOptions {
public:
  // plan_key(group) returns the options that force a new plan when they change.
  GroupOptions(PyObject* group, const py::object& plan_key) { capture(group, plan_key); }

  // Whether the plans of this group are still right. Comparing options by identity takes 2 ns each; plan_key
  // takes 170.
  bool is_current(PyObject* group, const py::object& plan_key) {
    if (immutable_ && unchanged(group)) return true;
    GroupOptions now(group, plan_key);
    if (!now.plan_key_.equal(plan_key_)) return false;  // it may come to be the same again
    *this = std::move(now);
    return true;
  }

  // Forgets the numbers of options that changed, which the next poll has yet to see.
  void forget_changed(PyObject* group) {
    if (!immutable_ || !unchanged(group)) hyper_is_read_ = false;
  }

  // Reads the numbers that enum Hyper names, which hyper(group) returns; returns whether Python code ran for
  // it. Without `on_host` a learning rate that lies on a device is not read, and its multiplier stands there.
  bool read(PyObject* group, const py::object& hyper, bool on_host = true) {
    const at::Tensor* const lr = lr_is_tensor_ && !lr_is_read_ ? rate_of(group) : nullptr;
    if (hyper_is_read_ && !(lr && (on_host || lr->is_cpu()))) return false;
    read_hyper(group, hyper, on_host);
    return true;
  }

  const std::array<double, HYPERS>& numbers() const { return hyper_; }
  double lr_mult() const { return lr_mult_; }  // as it was read with the numbers

  // Returns the learning rate where it is a tensor.
  static const at::Tensor* rate_of(PyObject* group) {
    PyObject* const lr = PyDict_GetItemString(group, "lr");
    return lr ? tensor_of(lr) : nullptr;
  }

  // Returns the row of scalars of the `count`-th step, from numbers that were read.
  template <bool kAdam> std::array<double, SCALARS> scalar_row(double count) const {
    if (!(count >= 1 && count < HUGE_VAL))
      throw py::value_error("a parameter's 'step' is negative or no finite number");
    std::array<double, SCALARS> values{};
    const auto power = [](double x, double n) { return std::pow(x, n); };
    scalars_of<kAdam>(hyper_.data(), hyper_[HYPER_LR], count, power, values.data());
    return values;
  }

private:
  struct Option {
    py::object key;
    const PyObject*
        value;        // nullptr: not compared (params, param_names), because each poll reads them anyway
    py::object held;  // the value, if it cannot change: no other object then gets its address
  };

  void capture(PyObject* group, const py::object& plan_key) {
    options_.clear();
    immutable_ = true, lr_is_tensor_ = lr_is_read_ = hyper_is_read_ = false, lr_ = -1;
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value);) {
      const auto is = [key](const char* name) {
        return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
      };
      if (is("lr")) lr_ = ptrdiff_t(options_.size());
      Option option{py::reinterpret_borrow<py::object>(key), nullptr, {}};
      if (!is("params") && !is("param_names")) {
        option.value = value;
        if (is_immutable(value)) {
          option.held = py::reinterpret_borrow<py::object>(value);
        } else if (is("lr") && tensor_of(value)) {
          lr_is_tensor_ = true;  // plans do not depend on its value, nor on which tensor it is
        } else {
          immutable_ = false;
        }
      }
      options_.push_back(std::move(option));
    }
    plan_key_ = plan_key(py::handle(group));
  }

  static bool is_rate(PyObject* value) {
    return PyFloat_CheckExact(value) && PyFloat_AS_DOUBLE(value) >= 0 && PyFloat_AS_DOUBLE(value) < HUGE_VAL;
  }

  // Takes another lr at once, because a schedule sets one at every step; but leaves it to Python to see
  // whether a negative one counts as 0 or ascends, and to refuse what is no finite number.
  bool unchanged(PyObject* group) {
    if (size_t(PyDict_Size(group)) != options_.size()) return false;
    PyObject *key, *value;
    size_t k = 0;
    for (Py_ssize_t i = 0; PyDict_Next(group, &i, &key, &value); ++k) {
      if (key != options_[k].key.ptr()) return false;
      if (lr_is_tensor_ && ptrdiff_t(k) == lr_) {
        if (!tensor_of(value)) return false;
        lr_is_read_ = false;  // it may have another value now, or be another tensor
        continue;
      }
      if (value == options_[k].value || !options_[k].value) continue;
      if (ptrdiff_t(k) != lr_ || !is_rate(value) || !is_rate(options_[k].held.ptr())) return false;
      options_[k].value = value;
      options_[k].held = py::reinterpret_borrow<py::object>(value);
      hyper_[HYPER_LR] = PyFloat_AS_DOUBLE(value) * lr_mult_;
    }
    return true;
  }

  void read_hyper(PyObject* group, const py::object& hyper, bool on_host) {
    auto options = py::reinterpret_borrow<py::dict>(group);
    // Of a tensor that lies on a device hyper() returns the multiplier; here its value is needed.
    const at::Tensor* lr = tensor_of(py::object(options["lr"]).ptr());
    if (on_host && lr && !lr->is_cpu()) {
      options = options.attr("copy")();
      options["lr"] = py::float_(py::object(options["lr"].attr("detach")()));
    }
    const auto numbers = py::tuple(hyper(options));
    for (int i = 0; i < HYPERS; ++i) hyper_[i] = py::float_(py::object(numbers[i]));
    lr_mult_ = options.contains("lr_mult") ? double(py::float_(py::object(options["lr_mult"]))) : 1;
    hyper_is_read_ = lr_is_read_ = true;
  }

  std::vector<Option> options_;
  py::object plan_key_;
  std::array<double, HYPERS> hyper_;
  double lr_mult_ = 1;
  ptrdiff_t lr_;    // which of the options it is
  bool immutable_;  // the values of all options are, but for an lr that is a tensor
  bool lr_is_tensor_, lr_is_read_;
  bool hyper_is_read_;  // hyper_ has the numbers of the options
};

}  // namespace fused_adamw
