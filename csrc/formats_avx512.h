// Loops of loops_cpu.h by intrinsics of AVX-512, where the compiler's own code is slower. The results have
// the same bits.
#pragma once

#include "formats_avx2.h"

#ifdef FUSED_X86
#if defined(__clang__)  // its target has no preferred width, and takes 512 bits
#define FUSED_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define FUSED_AVX512                                                                                         \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

// GCC 12 takes the operands that its own intrinsics leave undefined for mistakes.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fused_adamw {

// As philox_avx2(), with eight groups in a vector, and one instruction for two exclusive ors.
FUSED_AVX512 inline void philox_avx512(uint64_t seed, uint64_t group, uint32_t step, uint32_t index,
                                       uint16_t* to, int64_t groups) {
  constexpr int kChains = 4;
  const __m512i m0 = _mm512_set1_epi64(kPhilox0), m1 = _mm512_set1_epi64(kPhilox1);
  __m512i keys[kRounds][2];
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (auto& key : keys) {
    key[0] = _mm512_set1_epi64(k0), key[1] = _mm512_set1_epi64(k1);
    k0 += kWeyl0, k1 += kWeyl1;
  }
  for (; groups >= 8 * kChains; groups -= 8 * kChains) {
    __m512i c[kChains][4];
    for (auto& x : c) {
      // The order in which the interleaving below makes groups of neighbours.
      x[0] = _mm512_add_epi64(_mm512_set1_epi64(int64_t(group)), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
      x[1] = _mm512_srli_epi64(x[0], 32), x[2] = _mm512_set1_epi64(step), x[3] = _mm512_set1_epi64(index);
      group += 8;
    }
#pragma GCC unroll 7
    for (const auto& key : keys) {
      for (auto& x : c) {
        const __m512i a = _mm512_mul_epu32(x[0], m0), b = _mm512_mul_epu32(x[2], m1);
        x[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), x[1], key[0], 0x96);
        x[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), x[3], key[1], 0x96);
        x[1] = b, x[3] = a;
      }
    }
    for (const auto& x : c) {
      const __m512i low = _mm512_mask_shuffle_epi32(x[0], 0xaaaa, x[1], _MM_PERM_CCAA);
      const __m512i high = _mm512_mask_shuffle_epi32(x[2], 0xaaaa, x[3], _MM_PERM_CCAA);
      _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low, high));
      _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi64(low, high));
      to += 8 * kDrawing;
    }
  }
  philox_avx2(seed, group, step, index, to, groups);
}

// int8 codes, 16 at a time, of full blocks: a step takes 0.95 times as long as with those of AVX2.
// The larger of |x| * factor and a limit; of NaN, the limit.
FUSED_AVX512 inline __m512 ratio16(__m512 x, __m512 factor, float least) {
  return _mm512_range_ps(_mm512_mul_ps(x, factor), _mm512_set1_ps(least), 0xb);
}

FUSED_AVX512 inline __m512i random16(const uint16_t* random) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(random)));
}
template <bool kRandom>
FUSED_AVX512 inline __m512i encode16(FirstMoment, __m512 x, __m512 factor, const uint16_t* random) {
  const __m512 square = ratio16(x, factor, 0x1p-18f);
  __m512 root = _mm512_sqrt_ps(square);
  if constexpr (kRandom) {
    const __m512 drawn = _mm512_add_ps(_mm512_cvtepi32_ps(random16(random)), _mm512_set1_ps(0.5f));
    const __m512 below = _mm512_roundscale_ps(root, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_fnmadd_ps(below, below, square);
    const __m512 width = _mm512_fmadd_ps(below, _mm512_set1_ps(0x1p-15f), _mm512_set1_ps(0x1p-16f));
    const __mmask16 up =
        _mm512_cmp_ps_mask(_mm512_fnmadd_ps(drawn, width, rest), _mm512_setzero_ps(), _CMP_GT_OQ);
    root = _mm512_mask_add_ps(below, up, below, _mm512_set1_ps(1.0f));
  }
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
  return _mm512_cvtps_epi32(_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(root), _mm512_castps_si512(x), sign, 0xf8)));
}
template <bool kRandom>
FUSED_AVX512 inline __m512i encode16(SecondMoment, __m512 x, __m512 factor, const uint16_t* random) {
  const __m512 ratio = ratio16(x, factor, 0x1.2p-32f);
  __m512i add = _mm512_set1_epi32(int(SecondMoment::added(false, 0) - SecondMoment::kFirst));
  if constexpr (kRandom) {
    add = _mm512_add_epi32(_mm512_slli_epi32(random16(random), 4),
                           _mm512_set1_epi32(int(8 - SecondMoment::kFirst)));
  }
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(ratio), add), 20);
}

struct BlockAvx512 : BlockAvx2 {
  // Returns the bits of the largest magnitude.
  FUSED_AVX512 static uint32_t largest(const float* from) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < kQuantBlock; i += 16)
      most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(from + i))));
    return _mm512_reduce_max_epu32(most);
  }

  template <class Q, bool kRandom>
  FUSED_AVX512 static void encode(const float* from, float factor, uint8_t* to, const uint16_t* random) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int i = 0; i < kQuantBlock; i += 16) {
      const __m512i c = encode16<kRandom>(Q(), _mm512_loadu_ps(from + i), factors, random + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(c));
    }
  }
};

}  // namespace fused_adamw

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
