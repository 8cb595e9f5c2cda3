// How a value is stored: every format is read into the compute type and written back with one rounding, to
// nearest even unless said otherwise. The rules never see a storage type. fused_adamw/codecs.py does the
// same in Python and gives the reasons.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_adamw {

enum class Format : uint8_t { f32, f64, bf16, f16, i8 };
// A master holds the digits of a 16-bit parameter that its own format has no room for: as a compensation in
// the parameter's format (kahan), as the low half of a float32 (split16), or as a float32 (fp32).
enum class Master : uint8_t { none, kahan, split16, fp32 };

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

// A GPU converts the 16-bit formats by its own instructions. They round alike, but store every NaN as 0x7fff.

// Free of branches, so that it vectorises without F16C. Free of subnormal operands, because the processor
// takes them for 0 after a caller's torch.set_flush_denormal(True).
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
  // Below 2^-14 the result is subnormal. Adding 0.5 puts its last bit at the last bit of the sum, so the
  // addition itself rounds to nearest even.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;  // 65520 and above round to infinity
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  to.bits = uint16_t(rounded | (bits >> 16 & 0x8000u));
#endif
}

// ---- Stochastic rounding. Its bits come from a counter-based generator: they depend on the element and the
// step alone.

// The streams of a row that are rounded stochastically where the row asks for it, as bits. Every backend in
// C++ decides it here.
enum RandomStream : unsigned { RANDOM_PARAM = 1, RANDOM_FIRST_MOMENT = 2, RANDOM_SECOND_MOMENT = 4 };
constexpr unsigned random_streams(Format param, Master master, bool first_moment, bool second_moment,
                                  Format state) {
  const bool codes = state == Format::i8, bf16 = state == Format::bf16;
  return (param == Format::bf16 && master == Master::none ? RANDOM_PARAM : 0u) |
         (first_moment && codes ? RANDOM_FIRST_MOMENT : 0u) |
         (second_moment && (codes || bf16) ? RANDOM_SECOND_MOMENT : 0u);
}

struct Words {
  uint32_t x[4];
};

// Philox 4x32-10 (Salmon et al., SC 2011). Element i of a parameter, counted over all its shards, has word
// i % 4 of the counter (i / 4, step, index of the parameter); the key is the seed.
constexpr uint32_t kPhilox0 = 0xd2511f53u, kPhilox1 = 0xcd9e8d57u;
constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
FUSED_HD Words philox(uint64_t seed, uint64_t group, uint32_t step, uint32_t index) {
  uint32_t c0 = uint32_t(group), c1 = uint32_t(group >> 32), c2 = step, c3 = index;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(kPhilox0) * c0, b = uint64_t(kPhilox1) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += kWeyl0, k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The parameter and the second moment draw by the halves of an element's word. The first moment draws by 16
// bits that are independent of either half.
FUSED_HD uint32_t for_parameter(uint32_t word) { return word >> 16; }
FUSED_HD uint32_t for_second_moment(uint32_t word) { return word & 0xffffu; }
FUSED_HD uint32_t for_first_moment(uint32_t word) { return word * 0x9e3779b9u >> 16; }

// Rounds up with the probability that the cut digits make, given 16 random bits. An infinity has no such
// digits.
FUSED_HD void store_stochastic(float x, BFloat16& to, uint32_t random) {
  to.bits = uint16_t(x != x ? 0x7fc0u : (bit_cast<uint32_t>(x) + random) >> 16);
}

// ---- Masters: a 16-bit parameter and its extra stream hold one value of more digits.

// Rounds to nearest, ties away from zero: all values that round to one bf16 then differ in their low halves.
FUSED_HD uint32_t rounded_away(float x) { return x != x ? 0x7fc0u : (bit_cast<uint32_t>(x) + 0x8000u) >> 16; }

template <class P> FUSED_HD bool same(P a, P b) { return a.bits == b.bits; }

template <Master kMaster> struct Mastered;

// Kahan: the value is parameter + compensation. A compensation beyond an ulp of the parameter belongs to a
// value that was overwritten, and is ignored.
template <> struct Mastered<Master::kahan> {
  template <class P> using Extra = P;

  template <class P> FUSED_HD static float read(P p, P extra) {
    const float x = load(p), c = load(extra);
    P half;
    store(fma(0.5f, c, x), half);
    return same(half, p) ? x + c : x;
  }
  template <class P> FUSED_HD static void write(float x, P& p, P& extra) {
    store(x, p);
    store(x - load(p), extra);
  }
};

// The low half of a float32 whose high half, rounded, is the parameter. Two halves that do not round to the
// parameter (such as a negative low half beside a 0) belong to a value that was overwritten: the parameter
// counts alone.
template <> struct Mastered<Master::split16> {
  template <class P> using Extra = int16_t;

  FUSED_HD static float read(BFloat16 p, int16_t extra) {
    const float x = bit_cast<float>((uint32_t(p.bits) << 16) + uint32_t(int32_t(extra)));
    return rounded_away(x) == p.bits ? x : load(p);
  }
  FUSED_HD static void write(float x, BFloat16& p, int16_t& extra) {
    p.bits = uint16_t(rounded_away(x));
    extra = int16_t(uint16_t(x != x ? 0u : bit_cast<uint32_t>(x)));
  }
};

// A float32, which counts for as long as it rounds to the parameter. A parameter that was overwritten counts
// alone.
template <> struct Mastered<Master::fp32> {
  template <class P> using Extra = float;

  FUSED_HD static void round(float x, BFloat16& p) { p.bits = uint16_t(rounded_away(x)); }
  FUSED_HD static void round(float x, Float16& p) { store(x, p); }
  template <class P> FUSED_HD static float read(P p, float extra) {
    P rounded;
    round(extra, rounded);
    return same(rounded, p) ? extra : load(p);
  }
  template <class P> FUSED_HD static void write(float x, P& p, float& extra) {
    extra = x;
    round(x, p);
  }
};

// ---- int8: every block of consecutive elements shares a float32 scale, the largest finite magnitude in the
// block. A subnormal scale, whose reciprocal would overflow, is stored as 0.

constexpr int kQuantBlock = 128;

FUSED_HD uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
constexpr uint32_t kLeastNormal = 0x00800000u, kInfinite = 0x7f800000u;
// The bits of a magnitude that can be the scale of its block. Infinities, NaN and subnormals cannot, and
// count as 0. Magnitudes are compared as integers.
FUSED_HD uint32_t scale_bits(float x) {
  const uint32_t bits = magnitude_bits(x);
  return bits < kLeastNormal || bits >= kInfinite ? 0u : bits;
}
// The factor that brings the magnitudes of a block to [0, 1].
FUSED_HD float inverse(float scale) { return scale == 0 ? 0.0f : 1.0f / scale; }

// The larger and the smaller of two floats; of NaN and a number, the number.
FUSED_HD float larger(float x, float least) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, least);
#else
  return x > least ? x : least;
#endif
}
FUSED_HD float smaller(float x, float most) {
#if defined(__CUDA_ARCH__)
  return fminf(x, most);
#else
  return x < most ? x : most;
#endif
}
// x, or NaN where `of` is not finite.
FUSED_HD float nan_unless_finite(float of, float x) {
#if defined(__CUDA_ARCH__)
  return fma(of, 0.0f, x);
#else
  return magnitude_bits(of) < kInfinite ? x : bit_cast<float>(0x7fc00000u);
#endif
}
// The whole part of x >= 0.
FUSED_HD float whole_part(float x) {
#if defined(__CUDA_ARCH__)
  return truncf(x);
#else
  return x < 0x1p31f ? float(int32_t(x)) : x;
#endif
}

// A first moment is signed: code c means sign(c) * (c / 127)^2 times the scale, and -128 means NaN.
struct FirstMoment {
  using Code = int8_t;
  static constexpr Code kNaN = -128;

  FUSED_HD static float unit(float scale) { return scale * (1 / 16129.0f); }  // decode() multiplies by it
  FUSED_HD static float decode_number(int32_t code, float unit) {
    const float c = float(code);
    return c * std::fabs(c) * unit;
  }
  template <bool kRandom> FUSED_HD static uint8_t encode(float x, float inverse, uint32_t word) {
    const float ratio = std::fabs(x) * inverse;
    // A ratio below 1e-6 has the code 0 like 1e-6, whose root takes a GPU no longer than others.
    float root = std::sqrt(larger(ratio, 1e-6f)) * 127.0f;
    if constexpr (kRandom) {
      // Rounds up by where the value, not its root, lies between the values of two codes: only then is the
      // mean right.
      const float below = whole_part(root), drawn = (float(for_first_moment(word)) + 0.5f) * 0x1p-16f;
      root = below + (ratio * 16129.0f - below * below > drawn * (below + below + 1.0f) ? 1.0f : 0.0f);
      root = smaller(root, 127.0f);
    }
    const float code = larger(nan_unless_finite(x, std::copysign(root, x)), -128.0f);
    // The last bits of a sum with 1.5 * 2^23 are the nearest whole number, to even.
    return uint8_t(bit_cast<uint32_t>(code + 12582912.0f));
  }
};

// A second moment is logarithmic: code c > 0 means the float32 with the bits (c + 762) << 20, which has 3
// digits, times the scale. That is 8 steps an octave from 2^-31.7 to 1. Code 0 means 0 and stands for 0
// alone, so that no denominator vanishes; 255 means NaN.
struct SecondMoment {
  using Code = uint8_t;
  static constexpr Code kNaN = 255;

  FUSED_HD static float unit(float scale) { return scale; }
  FUSED_HD static float decode_number(int32_t code, float unit) {
    const float x = bit_cast<float>((uint32_t(code) + 762u) << 20) * unit;
    return code == 0 ? 0.0f : x;
  }
  // encode() cuts 20 bits off. This is what it adds before: half a step, or 20 random bits.
  FUSED_HD static uint32_t added(bool random, uint32_t word) {
    return random ? for_second_moment(word) << 4 | 8u : 0x80000u;
  }
  template <bool kRandom> FUSED_HD static uint8_t encode(float x, float inverse, uint32_t word) {
    // At most 1; but 1.125, whose code is 255, for infinities and NaN.
    const float ratio = smaller(std::fabs(x) * inverse, 1.125f);
    const int32_t code = int32_t(bit_cast<uint32_t>(ratio) + added(kRandom, word) - (762u << 20)) >> 20;
    // 1, but 0 for 0, which has no sign here: a second moment is a sum of squares.
    const uint32_t bits = bit_cast<uint32_t>(x), one = inverse == 0 ? 0 : 1, least = bits < one ? bits : one;
    return uint8_t(code > int32_t(least) ? code : int32_t(least));
  }
};

template <class Q> FUSED_HD float decode(int32_t code, float unit) {
  const float x = Q::decode_number(code, unit);
  return code == Q::kNaN ? bit_cast<float>(0x7fc00000u) : x;
}

}  // namespace fused_adamw
