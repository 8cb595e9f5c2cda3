// The update rules, once for C++: the CPU kernels run them on vectors, the CUDA kernel on registers.
//
// Every backend performs exactly these roundings in this order (fused_adamw/reference.py tells why), so
// the bits agree: `fma` rounds once, every other operation rounds once, to nearest even, and the
// compiler may not contract or reorder (-ffp-contract=off, -fmad=false).
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FUSED_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, so that the code is compiled for the instruction set of the function around it.
#define FUSED_HD inline __attribute__((always_inline))
#else
#define FUSED_HD inline
#endif

namespace fused_adamw {

constexpr int kRuleScalars = 8;  // of a rule, the same number for every rule
constexpr int kGradFactor = 2;   // the column in which every rule has it
constexpr int kStep = 8;         // the column of the number of the step, which stochastic rounding draws by
constexpr int kScalars = 9;      // width of a scalar row
constexpr int kMaxStates = 3;    // exp_avg, exp_avg_sq, max_exp_avg_sq

FUSED_HD float fma(float a, float b, float c) { return std::fma(a, b, c); }
FUSED_HD double fma(double a, double b, double c) { return std::fma(a, b, c); }

// a + w * (b - a), from the nearer end: torch.lerp. `w - 1` is exact where it is used.
template <typename T> FUSED_HD T lerp(T a, T b, T w) {
  const bool near_a = w < T(0.5);
  return fma(near_a ? w : w - T(1), b - a, near_a ? a : b);
}

// What every rule starts with: decoupled decay, then the gradient with its sign and L2 term.
template <typename T> struct Decayed {
  T p, g;
  FUSED_HD Decayed(T decay, T l2, T grad_factor, T p0, T g0)
      : p(fma(-decay, p0, p0)), g(fma(l2, p, grad_factor * g0)) {}
};

// Adam and AdamW: Algorithm 2 of arXiv 1711.05101.
template <bool kAmsgrad> struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr int kSecondMoment = 1;  // which of the states it is

  template <typename T> struct Scalars {
    T decay, l2, grad_factor, w1, w2, step_size, inv_sqrt_bc2, eps;
  };

  template <typename T> FUSED_HD static T update(const Scalars<T>& s, T p0, T g0, T& m, T& v, T& vmax) {
    const Decayed<T> x(s.decay, s.l2, s.grad_factor, p0, g0);
    m = lerp(m, x.g, s.w1);
    v = fma(s.w2, x.g * x.g, fma(-s.w2, v, v));
    T second = v;
    if constexpr (kAmsgrad) {
      vmax = (v > vmax || v != v) ? v : vmax;  // torch.maximum: a NaN on either side stays
      second = vmax;
    }
    const T denom = fma(std::sqrt(second), s.inv_sqrt_bc2, s.eps);
    return fma(-s.step_size, m / denom, x.p);
  }
};

// SGD and SGDW: Algorithm 1, and torch's momentum; which of them is a matter of c1, c2, take_g, take_b.
template <bool kMomentum> struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr int kSecondMoment = -1;

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
