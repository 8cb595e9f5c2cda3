// The rows of one launch on the CPU, made from those of fused_adamw/contract.py.
#pragma once

#include <ATen/ops/scalar_tensor.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "names.h"
#include "watch.h"

namespace fused_adamw {

// The index of the instruction set that steps run with: the fastest one, unless use_cpu_isa() sets another.
inline int isa = [] {
  int last = 0;
  while (cpu_isas()[last + 1]) ++last;
  return last;
}();

class CpuStep {
public:
  // rows: a list of contract.Row.
  CpuStep(const Watch& watch, const py::list& rows) : watch_(watch) {
    for (const py::handle& item : rows) {
      const auto slot = item.attr("slot").cast<size_t>();
      const auto p = item.attr("p").cast<at::Tensor>();
      const auto g = item.attr("g").cast<std::optional<at::Tensor>>();
      const auto states = item.attr("states").cast<std::vector<at::Tensor>>();
      const auto extra = item.attr("master_data").cast<std::optional<at::Tensor>>();
      const auto scales = item.attr("scales").cast<std::vector<at::Tensor>>();
      Row row{};
      row.p = p.mutable_data_ptr();
      row.numel = p.numel();
      row.p_format = format_of(p.scalar_type());
      row.rule = rule_of(item.attr("rule").cast<std::string>());
      row.g = g ? g->const_data_ptr() : nullptr;
      row.g_format = format_of(c10::toRealValueType((g ? *g : watch.grad(slot)).scalar_type()));
      if (states.size() > kMaxStates || scales.size() > std::size(row.scales))
        throw py::value_error("a row has " + std::to_string(states.size()) + " states and " +
                              std::to_string(scales.size()) + " scales, more than a launch takes");
      for (size_t j = 0; j < states.size(); ++j) row.state[j] = states[j].mutable_data_ptr();
      row.state_format = states.empty() ? row.p_format : format_of(states[0].scalar_type());
      row.master = master_of(item.attr("master").cast<std::string>());
      row.stochastic = item.attr("stochastic").cast<bool>();
      row.extra = extra ? extra->mutable_data_ptr() : nullptr;
      for (size_t j = 0; j < scales.size(); ++j) row.scales[j] = scales[j].mutable_data_ptr<float>();
      row.seed = item.attr("seed").cast<uint64_t>();
      row.index = item.attr("index").cast<uint32_t>();
      std::tie(row.offset, row.run, row.skip) =
          item.attr("numbering").cast<std::tuple<int64_t, int64_t, int64_t>>();
      rows_.push_back(row);
      sources_.push_back({slot, !g});
      keep_alive_.push_back(p);
      if (g) keep_alive_.push_back(*g);
      if (extra) keep_alive_.push_back(*extra);
      keep_alive_.insert(keep_alive_.end(), states.begin(), states.end());
      keep_alive_.insert(keep_alive_.end(), scales.begin(), scales.end());
    }
  }

  // Takes the scalars and the gradients of the coming step.
  void prepare_step(const py::list& scalar_rows) {
    scalars_.clear();
    for (const py::handle& item : scalar_rows) {
      const auto row = scalar_row_of(item);
      scalars_.insert(scalars_.end(), row.begin(), row.end());
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      const StepInputs& inputs = watch_.inputs(sources_[i].slot);
      if (inputs.scalars < 0 || size_t(inputs.scalars) >= scalar_rows.size())
        throw py::index_error("parameter " + std::to_string(sources_[i].slot) + " has no row of scalars");
      rows_[i].scalars = inputs.scalars;
      if (sources_[i].follow_gradient) rows_[i].g = inputs.grad;
    }
  }

  // Multiplies gradients by `factor`. A negative factor leaves everything as it is.
  void run(double factor) {
    if (factor < 0) return;
    for (size_t i = SCALAR_GRAD_FACTOR; i < scalars_.size(); i += SCALARS) scalars_[i] *= factor;
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
    size_t slot;           // of the parameter in the watch
    bool follow_gradient;  // the row steps by the gradient itself, which may move, not by a copy
  };
  const Watch& watch_;
  std::vector<Row> rows_;
  std::vector<double> scalars_;
  std::vector<Source> sources_;
  std::vector<at::Tensor> keep_alive_;  // the tensors that the rows point into
};

}  // namespace fused_adamw
