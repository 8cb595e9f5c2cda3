// What the gradients of a step are multiplied by: for clipping by their norm, and for a GradScaler.
// fused_adamw/clipping.py tells why.
#pragma once

#include <cmath>
#include <cstdint>

#include "rules.h"

namespace fused_adamw {

struct Clipping {
  double max_norm;
  bool clips;          // to max_norm
  bool skips;          // a step whose norm is not finite
  const float* scale;  // of a GradScaler, and whether it found an infinity: nullptr, or where they are read
  const float* found;
};

// Returns the factor, negative where the step is to be skipped, and takes the norm from the sum of squares.
FUSED_HD double factor_of(double sum, const Clipping& c, double& norm) {
  const double unscale = c.scale ? 1 / double(*c.scale) : 1;
  norm = std::sqrt(sum) * unscale;
  double factor = unscale;
  if (c.clips) {
    const double ratio = c.max_norm / (norm + 1e-6);
    factor *= ratio > 1 ? 1 : ratio;  // NaN stays
  }
  const bool skipped = (c.skips && !(norm < HUGE_VAL)) || (c.found && *c.found != 0);
  return skipped ? -1 : factor;
}

// The CUDA functions are launched as those of step.h are.
//
// Writes the sum of each segment of `sums`, segment k from bounds[k] to bounds[k + 1]; and to `flag`, unless
// `found` is nullptr, whether an infinity was found, 0 or 1.
const char* totals_cuda(const double* sums, const int64_t* bounds, int64_t segments, const float* found,
                        double* totals, float* flag, void* stream);
// Writes the factor, and the norm unless it is nullptr, from the sum of `sums`.
const char* factor_cuda(const double* sums, int64_t n, const Clipping& clipping, float* factor, float* norm,
                        void* stream);

}  // namespace fused_adamw
