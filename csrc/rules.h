// The update rules, once for C++: the CPU kernels run them on vectors, the CUDA kernel on registers.
//
// Every backend performs exactly these roundings in this order, so the bits agree (fused_adamw/reference.py
// tells why): `fma` rounds once, every other operation rounds once, to nearest even, and the compiler may not
// contract or reorder them (-ffp-contract=off, -fmad=false).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline: the code must be compiled for the instruction set of the function that it is inlined into.
#define FUSED_HD inline __attribute__((always_inline))
#else
#define FUSED_HD inline
#endif

#if defined(_MSC_VER) && !defined(__clang__) && !defined(__CUDACC__)
#pragma fp_contract(off)  // before Visual Studio 2022, /fp:precise contracts
#endif

namespace fused_adamw {

enum class Rule : uint8_t {
  adam,
  adam_amsgrad,
  sgd,
  sgd_momentum,
  adam_cautious_decay,
  adam_cautious_update,
  adabound,
  amsbound,
  adam_no_first_moment,
};
constexpr int kRules = 9;

// Whether a rule has Adam's moments.
constexpr bool is_adam(Rule rule) { return rule != Rule::sgd && rule != Rule::sgd_momentum; }
constexpr bool has_maximum(Rule rule) { return rule == Rule::adam_amsgrad || rule == Rule::amsbound; }
constexpr bool is_bound(Rule rule) { return rule == Rule::adabound || rule == Rule::amsbound; }

// The columns of a row of scalars, in the order of the fields of Adam::Scalars and Sgd::Scalars; after them
// the number of the step, which stochastic rounding draws its random bits by, and the weight of a new
// parameter in its average.
enum Scalar {
  SCALAR_DECAY,
  SCALAR_L2,
  SCALAR_GRAD_FACTOR,
  SCALAR_W1,
  SCALAR_W2,
  SCALAR_STEP_SIZE,
  SCALAR_INV_SQRT_BC2,
  SCALAR_EPS,
  SCALAR_STEP,
  SCALAR_EMA,
  SCALAR_HI,  // AdaBound's
  SCALARS,    // how many there are
  SCALAR_LO = SCALAR_INV_SQRT_BC2,
  SCALAR_MOMENTUM = SCALAR_W1,
  SCALAR_C1,
  SCALAR_C2,
  SCALAR_TAKE_G,
  SCALAR_TAKE_B,
};
constexpr int kMaxStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

FUSED_HD float fma(float a, float b, float c) { return std::fma(a, b, c); }
FUSED_HD double fma(double a, double b, double c) { return std::fma(a, b, c); }

// a + w * (b - a), computed from the nearer end as torch.lerp does. `w - 1` is exact for the w that reach it.
template <typename T> FUSED_HD T lerp(T a, T b, T w) {
  const bool near_a = w < T(0.5);
  return fma(near_a ? w : w - T(1), b - a, near_a ? a : b);
}

// The beginning of every rule: the decoupled decay of p, then the gradient with its sign and its L2 term.
template <typename T> struct Decayed {
  T p, g;
  FUSED_HD Decayed(T decay, T l2, T grad_factor, T p0, T g0)
      : p(fma(-decay, p0, p0)), g(fma(l2, p, grad_factor * g0)) {}
};

// Whether two numbers are on the same side of 0; on different sides. By no product, which may round to 0.
template <typename T> FUSED_HD bool agree(T a, T b) { return (a > 0 && b > 0) || (a < 0 && b < 0); }
template <typename T> FUSED_HD bool opposed(T a, T b) { return ((a > 0) & (b < 0)) | ((a < 0) & (b > 0)); }

// Adam and AdamW: Algorithm 2 of arXiv 1711.05101; AdaBound and AMSBound: arXiv 1902.09843.
template <Rule kRule> struct Adam {
  static constexpr int kStates = has_maximum(kRule) ? 3 : 2;
  static constexpr int kSecondMoment = 1;  // the index of its state

  template <typename T> struct Scalars {
    T decay, l2, grad_factor, w1, w2, step_size, inv_sqrt_bc2, eps;
    T step, ema, hi;  // hi and, in place of inv_sqrt_bc2, lo are AdaBound's
  };

  template <typename T> FUSED_HD static T update(const Scalars<T>& s, T p0, T g0, T& m, T& v, T& vmax) {
    const Decayed<T> x(s.decay, s.l2, s.grad_factor, p0, g0);
    m = lerp(m, x.g, s.w1);
    v = fma(s.w2, x.g * x.g, fma(-s.w2, v, v));
    T second = v;
    if constexpr (has_maximum(kRule)) {
      vmax = (v > vmax || v != v) ? v : vmax;  // as torch.maximum: a NaN on either side stays
      second = vmax;
    }
    if constexpr (is_bound(kRule)) {
      const T lo = s.inv_sqrt_bc2;
      T rate = s.step_size / (std::sqrt(second) + s.eps);
      rate = rate < lo ? lo : rate;  // keeps a NaN
      rate = rate > s.hi ? s.hi : rate;
      return fma(-rate, m, x.p);
    }
    const T denom = fma(std::sqrt(second), s.inv_sqrt_bc2, s.eps);
    T p = x.p, moved = m;
    if constexpr (kRule == Rule::adam_cautious_decay) p = opposed(m, p0) ? p0 : p;
    if constexpr (kRule == Rule::adam_cautious_update) moved *= agree(m, x.g) ? T(1) : T(0);  // keeps a NaN
    return fma(-s.step_size, moved / denom, p);
  }
};

// Adam whose beta1 is 0. The weight of the first moment that was is 0, so none is kept.
template <> struct Adam<Rule::adam_no_first_moment> {
  static constexpr int kStates = 1;
  static constexpr int kSecondMoment = 0;

  template <typename T> using Scalars = Adam<Rule::adam>::Scalars<T>;

  template <typename T> FUSED_HD static T update(Scalars<T> s, T p0, T g0, T& v, T&, T&) {
    T m = 0, vmax = 0;
    s.w1 = 1;
    return Adam<Rule::adam>::update(s, p0, g0, m, v, vmax);
  }
};

// SGD and SGDW, with the momentum of Algorithm 1 or of torch: c1, c2, take_g and take_b choose between them.
template <bool kMomentum> struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr int kSecondMoment = -1;  // it has none

  template <typename T> struct Scalars {
    T decay, l2, grad_factor, momentum, c1, c2, take_g, take_b;
  };

  template <typename T> FUSED_HD static T update(const Scalars<T>& s, T p0, T g0, T& b, T&, T&) {
    const Decayed<T> x(s.decay, s.l2, s.grad_factor, p0, g0);
    T d = s.take_g * x.g;
    if constexpr (kMomentum) {
      b = fma(s.c1, x.g, s.momentum * b);
      d = fma(s.take_b, b, d);
    }
    return fma(-s.c2, d, x.p);
  }
};

}  // namespace fused_adamw
