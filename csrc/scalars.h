// fused_adamw/scalars.py in C++: hyperparameters of a group and a step count -> a row of scalars, in double.
#pragma once

#include <cmath>

#include "rules.h"

namespace fused_adamw {

// lr, base_lr, decoupled decay, l2, grad_factor, then beta1, beta2, eps or momentum, dampening, flags
// (fused_adamw/launch.py).
constexpr int kHyper = 8;

// The row of the `count`-th step, 1 at the first; `power(x, n)` is x to the n-th.
template <bool kAdam, typename T, typename Power>
FUSED_HD void scalars_of(const double* h, double count, const Power& power, T* to) {
  const double lr = h[0];
  to[0] = T(lr / h[1] * h[2]);
  to[1] = T(h[3]);
  to[2] = T(h[4]);
  to[kStep] = T(count);
  if constexpr (kAdam) {
    to[3] = T(1 - h[5]);
    to[4] = T(1 - h[6]);
    to[5] = T(lr / (1 - power(h[5], count)));
    to[6] = T(1 / std::sqrt(1 - power(h[6], count)));
    to[7] = T(h[7]);
  } else {
    const double momentum = h[5], dampening = h[6];
    const int flags = int(h[7]);
    const bool nesterov = flags & 1, lr_in_momentum = flags & 2;
    const double into = lr_in_momentum ? lr : 1;
    const bool direct = momentum == 0 || nesterov;
    to[3] = T(momentum);
    to[4] = T(into * (count > 1 ? 1 - dampening : 1));
    to[5] = T(lr_in_momentum ? 1 : lr);
    to[6] = T(direct ? into : 0);
    to[7] = T(direct ? momentum : 1);
  }
}

}  // namespace fused_adamw
