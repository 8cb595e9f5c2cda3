// How a value is stored: every format is read exactly into the compute type and written back with one
// rounding, to nearest even. The rules never see a storage type.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_adamw {

enum class Format : uint8_t { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From> FUSED_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FUSED_HD float load(float x) { return x; }
FUSED_HD double load(double x) { return x; }
FUSED_HD float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// On a GPU the 16-bit formats are converted by its own instructions; they round the same, but every NaN
// becomes 0x7fff.

// Branch-free, so that it vectorises without F16C, and without subnormal operands, which a caller's
// torch.set_flush_denormal(True) would take for 0.
FUSED_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - 0x1p-14f;
  uint32_t bits = magnitude < 0x00800000u ? bit_cast<uint32_t>(subnormal) : magnitude + 0x38000000u;
  bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits;  // infinity, NaN
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

FUSED_HD void store(float x, float& to) { to = x; }
FUSED_HD void store(float x, double& to) { to = x; }
FUSED_HD void store(double x, float& to) { to = float(x); }
FUSED_HD void store(double x, double& to) { to = x; }

FUSED_HD void store(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);  // a carry out of a NaN would make it -0 or infinite
#endif
}

FUSED_HD void store(float x, Float16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 puts its last bit at the last bit of the sum, so
  // that the addition itself rounds to nearest even.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;  // 65520 and above round to infinity
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  to.bits = uint16_t(rounded | (bits >> 16 & 0x8000u));
#endif
}

}  // namespace fused_adamw
