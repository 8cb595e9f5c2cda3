// The tables of a launch on a device, brought to each step. watch.Watch.upload does the same in Python.
#pragma once

#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "watch.h"

namespace fused_adamw {

// Brings a table on the host to this step; returns whether any row changed.
inline bool update(const Watch& watch, const at::Tensor& table, const at::Tensor& slots) {
  int64_t* row = table.mutable_data_ptr<int64_t>();
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  const int64_t n = slots.size(0);
  int64_t* const steps = table.numel() > n * COLUMNS ? row + n * COLUMNS : nullptr;
  bool changed = false;
  const auto set = [&changed](int64_t& to, int64_t value) {
    changed |= to != value;
    to = value;
  };
  for (int64_t i = 0; i < n; ++i, row += COLUMNS) {
    const StepInputs& inputs = watch.inputs(slot[i]);
    int64_t addresses = 0;
    for (int k = 0; k < kAddresses; ++k) {
      const int64_t address = reinterpret_cast<int64_t>(inputs.addresses[k]);
      set(row[column_of(k)], address);
      addresses |= address;
    }
    const int64_t numel = row[COL_NUMEL] < 0 ? ~row[COL_NUMEL] : row[COL_NUMEL];
    set(row[COL_NUMEL], inputs.live ? numel : ~numel);
    if (steps)
      set(steps[i], inputs.live ? reinterpret_cast<int64_t>(inputs.step) : 0);
    else if (inputs.live)
      set(row[COL_SCALARS], inputs.scalars);
    const int64_t fixed = row[COL_FLAGS] & ~ALIGNED;
    set(row[COL_FLAGS], fixed | (fixed & SHARD_ALIGNED && addresses % 16 == 0 ? ALIGNED : 0));
  }
  return changed;
}

// Brings the tables of a launch on a device to this step in one copy: the rows, if any changed or
// `all_rows` is set, and the rows of scalars, which follow them in `buffer`. `table` is a copy of the rows
// on the host, and of the addresses of their counters if these are on the device; `slots` has the parameter
// of each row. torch's caching allocator of pinned memory does not hand the staging memory out again before
// the copy is done.
inline void upload(const Watch& watch, const at::Tensor& table, const at::Tensor& slots,
                   const py::list& scalar_rows, const at::Tensor& buffer, bool all_rows) {
  const bool rows = update(watch, table, slots) || all_rows;
  const size_t n = scalar_rows.size(), start = rows ? 0 : table.nbytes();
  const size_t bytes = table.nbytes() - start + n * SCALARS * sizeof(float);
  if (!bytes) return;
  const at::Tensor staging =
      at::empty({int64_t(bytes)}, at::TensorOptions(at::kByte).pinned_memory(buffer.is_cuda()));
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

}  // namespace fused_adamw
