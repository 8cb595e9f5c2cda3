// Loops of loops_cpu.h by intrinsics of AVX2, where the compiler's own code is slower. The results have the
// same bits.
#pragma once

#include "loops_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
#include <immintrin.h>

#define FUSED_AVX2 __attribute__((target("avx2,fma")))
#define FUSED_F16C __attribute__((target("avx2,fma,f16c")))

namespace fused_adamw {

// The processor's own conversions of float16. Compilers turn no loop into them, and the generic loops take 7
// times as long.
FUSED_F16C inline void load_f16c(const void* from, float* to, int64_t n) {
  const Float16* source = static_cast<const Float16*>(from);
  for (; n >= 8; n -= 8, source += 8, to += 8)
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
  load_loop<Float16, float>(source, to, n);
}
FUSED_F16C inline void store_f16c(const float* from, void* to, int64_t n) {
  Float16* target = static_cast<Float16*>(to);
  const __m256 sign = _mm256_set1_ps(-0.0f), nan = _mm256_set1_ps(bit_cast<float>(0x7fc00000u));
  for (; n >= 8; n -= 8, from += 8, target += 8) {
    __m256 x = _mm256_loadu_ps(from);
    // A NaN loses its payload, as in formats.h.
    x = _mm256_blendv_ps(x, _mm256_or_ps(_mm256_and_ps(x, sign), nan), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  store_loop<Float16, float>(from, target, n);
}

// A vector holds four groups, each in the low half of 64 bits, the half that the multiplication reads. Four
// vectors go through the rounds together, because a round is a chain of 6 cycles: with two, it takes 1.2
// times as long.
FUSED_AVX2 inline void philox_avx2(uint64_t seed, uint64_t group, uint32_t step, uint32_t index, uint16_t* to,
                                   int64_t groups) {
  constexpr int kChains = 4;
  const __m256i m0 = _mm256_set1_epi64x(kPhilox0), m1 = _mm256_set1_epi64x(kPhilox1);
  __m256i keys[kRounds][2];
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (auto& key : keys) {
    key[0] = _mm256_set1_epi64x(k0), key[1] = _mm256_set1_epi64x(k1);
    k0 += kWeyl0, k1 += kWeyl1;
  }
  for (; groups >= 4 * kChains; groups -= 4 * kChains) {
    __m256i c[kChains][4];
    for (auto& x : c) {
      x[0] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(group)), _mm256_setr_epi64x(0, 1, 2, 3));
      x[1] = _mm256_srli_epi64(x[0], 32), x[2] = _mm256_set1_epi64x(step), x[3] = _mm256_set1_epi64x(index);
      group += 4;
    }
#pragma GCC unroll 7
    for (const auto& key : keys) {
      for (auto& x : c) {
        const __m256i a = _mm256_mul_epu32(x[0], m0), b = _mm256_mul_epu32(x[2], m1);
        x[0] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(x[1], key[0]));
        x[2] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(x[3], key[1]));
        x[1] = b, x[3] = a;
      }
    }
    for (const auto& x : c) {
      const __m256i low = _mm256_blend_epi32(x[0], _mm256_slli_epi64(x[1], 32), 0xaa);
      const __m256i high = _mm256_blend_epi32(x[2], _mm256_slli_epi64(x[3], 32), 0xaa);
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_permute2x128_si256(even, odd, 0x31));
      to += 4 * kDrawing;
    }
  }
  philox_loop(seed, group, step, index, to, groups);
}

// int8 codes, 8 at a time, of full blocks. The generic loops take 1.6 times as long because they widen and
// narrow by halves.
FUSED_AVX2 inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

FUSED_AVX2 inline __m256 decode8(FirstMoment, const uint8_t* from, __m256 unit) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256 c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  return _mm256_mul_ps(_mm256_mul_ps(c, magnitude(c)), unit);
}
FUSED_AVX2 inline __m256 decode8(SecondMoment, const uint8_t* from, __m256 unit) {
  const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(c, 20), _mm256_set1_epi32(SecondMoment::kFirst));
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), unit);
}

FUSED_AVX2 inline __m256i random8(const uint16_t* random) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(random)));
}
template <bool kRandom>
FUSED_AVX2 inline __m256i encode8(FirstMoment, __m256 x, __m256 factor, const uint16_t* random) {
  // Of NaN, the instruction takes the second operand.
  const __m256 square = _mm256_max_ps(_mm256_mul_ps(magnitude(x), factor), _mm256_set1_ps(0x1p-18f));
  const __m256 root = _mm256_sqrt_ps(square);
  __m256i c = _mm256_cvtps_epi32(root);
  if constexpr (kRandom) {
    const __m256 drawn = _mm256_add_ps(_mm256_cvtepi32_ps(random8(random)), _mm256_set1_ps(0.5f));
    c = _mm256_cvttps_epi32(root);
    const __m256 below = _mm256_cvtepi32_ps(c), rest = _mm256_fnmadd_ps(below, below, square);
    const __m256 width = _mm256_fmadd_ps(below, _mm256_set1_ps(0x1p-15f), _mm256_set1_ps(0x1p-16f));
    const __m256 up = _mm256_cmp_ps(_mm256_fnmadd_ps(drawn, width, rest), _mm256_setzero_ps(), _CMP_GT_OQ);
    c = _mm256_sub_epi32(c, _mm256_castps_si256(up));
  }
  return _mm256_sign_epi32(c, _mm256_castps_si256(x));
}
template <bool kRandom>
FUSED_AVX2 inline __m256i encode8(SecondMoment, __m256 x, __m256 factor, const uint16_t* random) {
  const __m256 ratio = _mm256_max_ps(_mm256_mul_ps(magnitude(x), factor), _mm256_set1_ps(0x1.2p-32f));
  __m256i add = _mm256_set1_epi32(int(SecondMoment::added(false, 0) - SecondMoment::kFirst));
  if constexpr (kRandom) {
    add = _mm256_add_epi32(_mm256_slli_epi32(random8(random), 4),
                           _mm256_set1_epi32(int(8 - SecondMoment::kFirst)));
  }
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(ratio), add), 20);
}

// Loops over a full block.
struct BlockAvx2 {
  template <class Q> FUSED_AVX2 static void decode(const uint8_t* from, float unit, float* to) {
    const __m256 units = _mm256_set1_ps(unit);
    for (int i = 0; i < kQuantBlock; i += 8) _mm256_storeu_ps(to + i, decode8(Q(), from + i, units));
  }

  // Returns the bits of the largest magnitude.
  FUSED_AVX2 static uint32_t largest(const float* from) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < kQuantBlock; i += 8)
      most = _mm256_max_epu32(most, _mm256_castps_si256(magnitude(_mm256_loadu_ps(from + i))));
    __m128i last = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    last = _mm_max_epu32(last, _mm_shuffle_epi32(last, 0x4e));
    last = _mm_max_epu32(last, _mm_shuffle_epi32(last, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(last));
  }

  template <class Q, bool kRandom>
  FUSED_AVX2 static void encode(const float* from, float factor, uint8_t* to, const uint16_t* random) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (int i = 0; i < kQuantBlock; i += 32) {
      __m256i c[4];
      for (int k = 0; k < 4; ++k)
        c[k] = encode8<kRandom>(Q(), _mm256_loadu_ps(from + i + 8 * k), factors, random + i + 8 * k);
      // Packing saturates, so signed codes take the signed instruction. It works on halves of the vector, so
      // a permutation follows.
      const __m256i low = _mm256_packs_epi32(c[0], c[1]), high = _mm256_packs_epi32(c[2], c[3]);
      __m256i bytes = std::is_signed<typename Q::Code>::value ? _mm256_packs_epi16(low, high)
                                                              : _mm256_packus_epi16(low, high);
      bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bytes);
    }
  }
};

// Loops over the full blocks of a tile by those of `Block`, and over the rest by those of loops_cpu.h.
template <class Block, class Q>
FUSED_HD void decode_blocks(const void* codes, const float* scales, float* to, int64_t n) {
  const uint8_t* from = static_cast<const uint8_t*>(codes);
  for (; n >= kQuantBlock; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock)
    Block::template decode<Q>(from, Q::decoding(*scales++), to);
  decode_loop<Q>(from, scales, to, n);
}
template <class Block, class Q, bool kRandom> FUSED_HD void
encode_blocks(const float* from, void* codes, float* scales, const uint16_t* random, int64_t n) {
  uint8_t* to = static_cast<uint8_t*>(codes);
  // Computes all scales first, so that their chains of 40 cycles each overlap.
  const int64_t full = n / kQuantBlock;
  float factors[kTile / kQuantBlock];
  for (int64_t b = 0; b < full; ++b) {
    scales[b] = scale_of(Block::largest(from + b * kQuantBlock));
    factors[b] = Q::encoding(scales[b]);
  }
  for (int64_t b = 0; b < full; ++b, from += kQuantBlock, to += kQuantBlock) {
    Block::template encode<Q, kRandom>(from, factors[b], to, random);
    if constexpr (kRandom) random += kQuantBlock;
  }
  encode_loop<Q, kRandom>(from, to, scales + full, random, n % kQuantBlock);
}

}  // namespace fused_adamw
#endif
