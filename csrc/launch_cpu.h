// The rows of one launch on the CPU, made from those of fused_adamw/contract.py.
#pragma once

#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "factor.h"
#include "names.h"
#include "watch.h"

namespace fused_adamw {

// The index of the instruction set that steps run with: the fastest one, unless use_cpu_isa() sets another.
inline int isa = [] {
  int last = 0;
  while (cpu_isas()[last + 1]) ++last;
  return last;
}();

// contract.Clipping, whose tensors the caller holds.
inline Clipping clipping_of(const py::tuple& asked) {
  const auto max_norm = asked[0].cast<std::optional<double>>();
  const auto read = [](const py::handle& t) {
    return t.is_none() ? nullptr : THPVariable_Unpack(t.ptr()).const_data_ptr<float>();
  };
  return {max_norm.value_or(0), max_norm.has_value(), asked[1].cast<bool>(), read(asked[2]), read(asked[3])};
}

class CpuStep {
public:
  // rows: a list of contract.Row.
  CpuStep(Watch& watch, const py::list& rows) : watch_(watch) {
    watch.share();
    for (const py::handle& item : rows) {
      const auto dtype = [&item](const char* name) { return item.attr(name).cast<at::ScalarType>(); };
      Row row{};
      row.p_format = format_of(dtype("p"));
      row.g_format = format_of(dtype("g"));
      row.state_format = format_of(dtype("state"));
      row.ema_format = format_of(dtype("ema"));
      row.rule = rule_of(item.attr("rule").cast<std::string>());
      row.master = master_of(item.attr("master").cast<std::string>());
      row.stochastic = item.attr("stochastic").cast<bool>();
      row.seed = item.attr("seed").cast<uint64_t>();
      row.index = item.attr("index").cast<uint32_t>();
      std::tie(row.offset, row.run, row.skip) =
          item.attr("numbering").cast<std::tuple<int64_t, int64_t, int64_t>>();
      rows_.push_back(row);
      sources_.push_back({item.attr("slot").cast<size_t>(), item.attr("numel").cast<int64_t>()});
      if (item.attr("measured").cast<bool>()) measured_.push_back(rows_.size() - 1);
    }
    std::vector<size_t> firsts;
    for (const size_t i : measured_) {
      firsts.push_back(squares_.size());
      squares_.resize(squares_.size() + parts_of(sources_[i].numel) * 3);
    }
    for (size_t k = 0; k < measured_.size(); ++k) rows_[measured_[k]].squares = squares_.data() + firsts[k];
  }

  // Takes the scalars and the addresses of the coming step. A row without a gradient has no elements in it.
  void prepare_step(const py::object&, const py::list& scalar_rows) {
    scalars_.clear();
    for (const py::handle& item : scalar_rows) {
      const auto row = scalar_row_of(item);
      scalars_.insert(scalars_.end(), row.begin(), row.end());
    }
    take_addresses();
  }

  // Polls, steps and counts, with gradients as they are; returns false, and has done nothing, if the plans do
  // not hold. No Python code runs between the last poll and the launch (but for DTensors whose spec is
  // another object): not that of other threads, signal handlers or finalizers, which could drop what was
  // polled.
  bool step(const py::list& groups, const py::dict& state, const py::object& plan_key) {
    if (!watch_.poll(groups, state, plan_key)) return false;
    if (watch_.read_hypers(groups) && (!watch_.poll_tensors(groups, state) || watch_.read_hypers(groups)))
      return false;
    scalars_.clear();
    watch_.for_scalar_rows([this](const std::array<double, SCALARS>& row) {
      scalars_.insert(scalars_.end(), row.begin(), row.end());
    });
    take_addresses();
    run({}, 1, true);
    return true;
  }

  // Steps, with gradients multiplied by `factor`, and counts the step where `count`: in one call, so that no
  // interrupt comes in between. A negative factor leaves everything as it is.
  // It is counted first, because other Python threads may drop parameters while the GIL is released.
  void run(const py::object&, double factor, bool count) {
    if (count) watch_.advance();
    if (!(factor < 0)) {
      for (const size_t i : measured_)
        if (!rows_[i].numel) std::fill_n(rows_[i].squares, parts_of(sources_[i].numel) * 3, 0);
      for (size_t i = SCALAR_GRAD_FACTOR; i < scalars_.size(); i += SCALARS) scalars_[i] *= factor;
      without_gil([&] { step_cpu(rows_.data(), int64_t(rows_.size()), scalars_.data(), isa); });
    }
  }

  // Returns contract.Launch.squares.
  at::Tensor squares() const {
    const at::Tensor totals = at::zeros({3, int64_t(measured_.size())}, at::kDouble);
    double* const to = totals.mutable_data_ptr<double>();
    for (size_t k = 0; k < measured_.size(); ++k) {
      const double* from = rows_[measured_[k]].squares;
      for (int64_t left = parts_of(sources_[measured_[k]].numel); left; --left, from += 3)
        for (size_t j = 0; j < 3; ++j) to[j * measured_.size() + k] += from[j];
    }
    return totals;
  }

  int parts() const { return 1; }
  void sum_squares(const py::object&, const at::Tensor& sums) const {
    double sum = 0;
    without_gil([&] { sum = sum_squares_cpu(rows_.data(), int64_t(rows_.size())); });
    *sums.mutable_data_ptr<double>() = sum;
  }

  // contract.Summed; nothing runs after a call has returned.
  void keep(const at::Tensor&) const {}
  void totals(const at::Tensor& sums, const at::Tensor& bounds, const std::optional<at::Tensor>& found,
              const at::Tensor& totals, const at::Tensor& flag) const {
    const double* const from = sums.const_data_ptr<double>();
    const int64_t* const bound = bounds.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < totals.numel(); ++k)
      totals.mutable_data_ptr<double>()[k] = total(from + bound[k], bound[k + 1] - bound[k]);
    if (found) *flag.mutable_data_ptr<float>() = *found->const_data_ptr<float>() != 0 ? 1 : 0;
  }

  double factor(const at::Tensor& sums, const py::tuple& asked, const at::Tensor&,
                const std::optional<at::Tensor>& norm) const {
    double root;
    const double factor =
        factor_of(total(sums.const_data_ptr<double>(), sums.numel()), clipping_of(asked), root);
    if (norm) *norm->mutable_data_ptr<float>() = float(root);
    return factor;
  }

private:
  static double total(const double* sums, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += sums[i];
    return total;
  }

  struct Source {
    size_t slot;  // of the parameter in the watch
    int64_t numel;
  };
  // Up to this many elements, at most about a millisecond, other Python threads wait: holding the memory for
  // them costs 20 ns a tensor.
  static constexpr int64_t kWithGil = 1 << 20;

  static int64_t parts_of(int64_t numel) { return (numel + kPart - 1) / kPart; }

  void take_addresses() {
    const bool moved = moves_ != watch_.moves();
    elements_ = 0;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const StepInputs& inputs = watch_.inputs(sources_[i].slot);
      Row& row = rows_[i];
      row.numel = inputs.live ? sources_[i].numel : 0;
      elements_ += row.numel;
      row.g = inputs.addresses[COL_GRAD];
      if (inputs.live) row.scalars = inputs.scalars;
      if (inputs.live && size_t(inputs.scalars) >= scalars_.size() / SCALARS)
        throw py::index_error("parameter " + std::to_string(sources_[i].slot) + " has no row of scalars");
      if (moved) move(row, inputs);
    }
    moves_ = watch_.moves();
  }

  static void move(Row& row, const StepInputs& inputs) {
    const auto address = [&inputs](int column) {
      return const_cast<void*>(inputs.addresses[address_index(column)]);
    };
    row.p = address(COL_PARAM);
    for (int j = 0; j < kMaxStates; ++j) row.state[j] = address(COL_STATE + j);
    row.extra = address(COL_EXTRA);
    for (int j = 0; j < 2; ++j) row.scales[j] = static_cast<float*>(address(COL_SCALES + j));
    row.ema = address(COL_EMA);
  }

  // Other Python threads may drop tensors while the GIL is released, so their memory is held for as long.
  template <class F> void without_gil(const F& f) const {
    if (elements_ <= kWithGil) return f();
    const auto held = watch_.hold();
    const py::gil_scoped_release release;
    f();
  }

  Watch& watch_;
  std::vector<Row> rows_;
  std::vector<double> scalars_;
  std::vector<Source> sources_;
  std::vector<size_t> measured_;  // rows with statistics
  std::vector<double> squares_;   // theirs
  int64_t moves_ = -1, elements_ = 0;
};

}  // namespace fused_adamw
