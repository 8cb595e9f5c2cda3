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
                                       uint32_t* to, int64_t groups) {
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
      _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(low, high));
      to += 32;
    }
  }
  philox_avx2(seed, group, step, index, to, groups);
}

}  // namespace fused_adamw

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
