// fused_adamw/scalars.py in C++: the hyperparameters of a group and a step count -> a row of scalars, in
// double.
#pragma once

#include <cmath>

#include "rules.h"

namespace fused_adamw {

// The columns of a row of hyperparameters, float64 each. scalars.py fills it, and checks the ranges; the
// decay is lr / base_lr * decay, so a base_lr of 1 makes it torch's.
enum Hyper {
  HYPER_LR,
  HYPER_BASE_LR,
  HYPER_DECAY,  // decoupled weight decay
  HYPER_L2,     // weight decay that is added to the gradient
  HYPER_SIGN,   // -1 to maximize
  HYPER_BETA1,
  HYPER_BETA2,
  HYPER_EPS,
  HYPER_RECTIFY,     // 0, or what RAdam does
  HYPER_EMA_DECAY,   // of the average of the parameter
  HYPER_EMA_WARMUP,  // 1 where that decay grows to its value, else 0
  HYPER_FINAL,       // of AdaBound: final_lr / base_lr
  HYPER_GAMMA,       // of AdaBound; 0 of the others
  HYPERS,            // how many there are
  HYPER_MOMENTUM = HYPER_BETA1,
  HYPER_DAMPENING,
  HYPER_FLAGS,  // NESTEROV, LR_IN_MOMENTUM
};
enum SgdFlag { NESTEROV = 1, LR_IN_MOMENTUM = 2 };
enum Rectify { RECTIFY = 1, RECTIFY_OR_WAIT = 2 };

// Computes the row of the `count`-th step, 1 at the first; `power(x, n)` is x to the n-th. `lr` is that of
// `hyper`, or what a tensor says that only the device reads.
template <bool kAdam, typename T, typename Power>
FUSED_HD void scalars_of(const double* hyper, double lr, double count, const Power& power, T* row) {
  row[SCALAR_DECAY] = T(lr / hyper[HYPER_BASE_LR] * hyper[HYPER_DECAY]);
  row[SCALAR_L2] = T(hyper[HYPER_L2]);
  row[SCALAR_GRAD_FACTOR] = T(hyper[HYPER_SIGN]);
  row[SCALAR_STEP] = T(count);
  const double ema_decay = hyper[HYPER_EMA_DECAY], early = (1 + count) / (10 + count);
  row[SCALAR_EMA] = T(1 - (hyper[HYPER_EMA_WARMUP] != 0 && early < ema_decay ? early : ema_decay));
  if constexpr (kAdam) {
    const double beta2 = hyper[HYPER_BETA2], beta2_power = power(beta2, count), bc2 = 1 - beta2_power;
    const double step_size = lr / (1 - power(hyper[HYPER_BETA1], count));
    row[SCALAR_W1] = T(1 - hyper[HYPER_BETA1]);
    row[SCALAR_W2] = T(1 - beta2);
    row[SCALAR_STEP_SIZE] = T(step_size);
    row[SCALAR_INV_SQRT_BC2] = T(1 / std::sqrt(bc2));
    row[SCALAR_EPS] = T(hyper[HYPER_EPS]);
    if (hyper[HYPER_RECTIFY] != 0) {
      const double last = 2 / (1 - beta2) - 1, rho = last - 2 * count * beta2_power / bc2;
      if (rho > 5) {
        const double ratio = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho);
        row[SCALAR_STEP_SIZE] = T(step_size * std::sqrt(ratio * bc2));
        row[SCALAR_INV_SQRT_BC2] = 1;
      } else {
        row[SCALAR_INV_SQRT_BC2] = 0;
        row[SCALAR_EPS] = 1;
        if (hyper[HYPER_RECTIFY] != double(RECTIFY)) row[SCALAR_STEP_SIZE] = row[SCALAR_DECAY] = 0;
      }
    }
    if (hyper[HYPER_GAMMA] != 0) {
      const double final = lr * hyper[HYPER_FINAL], reach = hyper[HYPER_GAMMA] * count;
      const double near = final * reach / (reach + 1), far = final * (reach + 1) / reach;
      row[SCALAR_STEP_SIZE] = T(step_size * std::sqrt(bc2));
      row[SCALAR_LO] = T(final < 0 ? far : near);
      row[SCALAR_HI] = T(final < 0 ? near : far);
    }
  } else {
    const double momentum = hyper[HYPER_MOMENTUM], dampening = hyper[HYPER_DAMPENING];
    const int flags = int(hyper[HYPER_FLAGS]);
    const bool nesterov = flags & NESTEROV, lr_in_momentum = flags & LR_IN_MOMENTUM;
    const double into = lr_in_momentum ? lr : 1;
    const bool direct = momentum == 0 || nesterov;
    row[SCALAR_MOMENTUM] = T(momentum);
    row[SCALAR_C1] = T(into * (count > 1 ? 1 - dampening : 1));
    row[SCALAR_C2] = T(lr_in_momentum ? 1 : lr);
    row[SCALAR_TAKE_G] = T(direct ? into : 0);
    row[SCALAR_TAKE_B] = T(direct ? momentum : 1);
  }
}

}  // namespace fused_adamw
