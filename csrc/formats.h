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

// Philox 4x32-7 (Salmon et al., SC 2011): the fewest rounds that pass BigCrush, as 10 do. Two neighbours,
// elements 2j and 2j + 1 of a parameter, counted over all its shards, share word j % 4 of the counter
// (j / 4, step, index of the parameter); the key is the seed.
constexpr int kDrawing = 8;  // the elements that share a counter
constexpr int kRounds = 7;
constexpr uint32_t kPhilox0 = 0xd2511f53u, kPhilox1 = 0xcd9e8d57u;
constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
FUSED_HD Words philox(uint64_t seed, uint64_t group, uint32_t step, uint32_t index) {
  uint32_t c0 = uint32_t(group), c1 = uint32_t(group >> 32), c2 = step, c3 = index;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = uint64_t(kPhilox0) * c0, b = uint64_t(kPhilox1) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += kWeyl0, k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The average of a parameter draws by words of its own: their counters have the highest bit set, and no
// element has so high a number. So they are independent of all other words of the seed.
constexpr uint64_t kAverageWords = uint64_t(1) << 63;

// Of the word, the parameter of the even neighbour draws the lower half and that of the odd one the upper
// half. A moment draws the other's half plus a multiple of its own. So what one stream draws is independent
// of what it draws elsewhere, and so are parameter and moment of one element: whatever the one is, the other
// has each of its values once. Of all other pairs this holds but for the two lowest bits, because neither
// factor, nor their difference, is a multiple of 8.
FUSED_HD uint32_t for_moment(uint16_t own, uint16_t other, uint32_t factor) {
  return (other + own * factor) & 0xffffu;
}
// The same of a word whose lower half is the element's own, in two instructions.
FUSED_HD uint32_t for_moment(uint32_t word, uint32_t factor) { return word * (factor << 16 | 1u) >> 16; }
FUSED_HD uint32_t for_parameter(uint32_t word) { return word & 0xffffu; }
FUSED_HD uint32_t exchanged(uint32_t word) { return word << 16 | word >> 16; }

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

// ---- int8: every block of consecutive elements shares a float32 scale, the largest magnitude in the block,
// rounded up to 8 digits. Of a block with a NaN, an infinity or 2^126 it is NaN, and so is all that is read
// of the block.

constexpr int kQuantBlock = 128;

FUSED_HD uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }

// The scale of a block whose largest magnitude has these bits. Magnitudes are compared as integers: a NaN is
// more than any number.
FUSED_HD float scale_of(uint32_t largest) {
  return bit_cast<float>(largest < 0x7e800000u ? (largest + 0xffffu) & 0xffff0000u : 0x7fc00000u);
}

// A GPU's reciprocal root errs by an ulp or two, and has no slow path as a division and an IEEE root do. One
// step of Newton's mends it for the 8 digits of a scale, and for each square far enough to give the code of
// the IEEE root (tests/test_codes.py).
#if defined(__CUDA_ARCH__)
FUSED_HD float reciprocal_root(float x) {
  float to;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(to) : "f"(x));
  return to;
}
#endif
// The factor that brings the magnitudes of a block to [0, 1]. Where its scale is subnormal or NaN all codes
// are 0: the factor is 0 here, and NaN on a GPU.
FUSED_HD float inverse(float scale) {
#if defined(__CUDA_ARCH__)
  const float root = reciprocal_root(scale), near = root * root;
  return fma(fma(-scale, near, 1.0f), near, near);
#else
  return scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
#endif
}
FUSED_HD float root_of(float square) {
#if defined(__CUDA_ARCH__)
  const float near = reciprocal_root(square), root = square * near;
  return fma(fma(-root, root, square), 0.5f * near, root);
#else
  return std::sqrt(square);
#endif
}

// The larger of a float and a limit; of NaN, the limit.
FUSED_HD float larger(float x, float least) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, least);
#else
  return x > least ? x : least;
#endif
}

// A first moment is signed: code c means sign(c) * c^2 / 16128 of the scale.
struct FirstMoment {
  using Code = int8_t;
  static constexpr uint16_t kFactor = 0xbb64;

  FUSED_HD static float decoding(float scale) { return scale * (1 / 16128.0f); }
  FUSED_HD static float encoding(float scale) { return inverse(scale) * 16128.0f; }
  FUSED_HD static float decode(int32_t code, float unit) {
    const float c = float(code);
    return c * std::fabs(c) * unit;
  }
  // A square below 2^-18 has the code 0, as 2^-18 has. At most 16128 of them keep below 127.5^2.
  template <bool kRandom> FUSED_HD static uint8_t encode(float x, float factor, uint32_t random) {
    const float square = larger(std::fabs(x) * factor, 0x1p-18f), root = root_of(square);
    float code = root;
    if constexpr (kRandom) {
      // Rounds up by where the value, not its root, lies between the values of two codes: only then is the
      // mean right.
      const float below = whole_part(root), drawn = float(random) + 0.5f;
      const float rest = fma(-below, below, square), width = fma(below, 0x1p-15f, 0x1p-16f);
      code = below + (fma(-drawn, width, rest) > 0 ? 1.0f : 0.0f);
    }
    // The last bits of a sum with 1.5 * 2^23 are the nearest whole number, to even.
    return uint8_t(bit_cast<uint32_t>(std::copysign(code, x) + 12582912.0f));
  }

  // The whole part of a root; of a whole root perhaps 1 less, which the rounding up makes good.
  FUSED_HD static float whole_part(float root) { return root - 0.5f + 12582912.0f - 12582912.0f; }
};

// A second moment is logarithmic: code c means the float32 with the bits (c + 761) << 20, which has 3 digits,
// times the scale. That is 8 steps an octave from 2^-31.8 to 1. What is less has the code 0, so that no
// denominator vanishes beside a larger one.
struct SecondMoment {
  using Code = uint8_t;
  static constexpr uint16_t kFactor = 0x9e36;
  static constexpr uint32_t kFirst = 761u << 20;

  FUSED_HD static float decoding(float scale) { return scale; }
  FUSED_HD static float encoding(float scale) { return inverse(scale); }
  FUSED_HD static float decode(int32_t code, float unit) {
    return bit_cast<float>((uint32_t(code) << 20) + kFirst) * unit;
  }
  // encode() cuts 20 bits off. This is what it adds before: half a step, or 16 random bits and half of one.
  FUSED_HD static uint32_t added(bool stochastic, uint32_t random) {
    return stochastic ? random << 4 | 8u : 0x80000u;
  }
  template <bool kRandom> FUSED_HD static uint8_t encode(float x, float factor, uint32_t random) {
    const float ratio = larger(std::fabs(x) * factor, 0x1.2p-32f);
    return uint8_t((bit_cast<uint32_t>(ratio) + (added(kRandom, random) - kFirst)) >> 20);
  }
};

}  // namespace fused_adamw
