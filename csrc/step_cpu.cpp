// The CPU backend: one parallel region over all tensors, the rule per element, compiled once for each
// instruction set and chosen at run time.
#include <algorithm>
#include <limits>
#include <vector>

#include "step.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define FUSED_RESTRICT __restrict__
#else
#define FUSED_RESTRICT
#endif

namespace fused_adamw {
namespace {

// Threads are given whole blocks: no two write the same cache line of an aligned tensor, or share a scale.
constexpr int64_t kBlock = kQuantBlock;
// Narrow formats are converted through tiles that stay in the L1 cache: at most 6 of 4 KiB.
constexpr int64_t kTile = 512;
static_assert(kTile % kBlock == 0, "a tile is whole blocks");
// A parallel region costs about as much as this many elements of one thread.
constexpr int64_t kSerial = 16384;
constexpr int64_t kRowsAhead = 2;

// ---- The loops, written once. Inlined into a function per instruction set, they are vectorised for it.

// A word of a stream: one value of the compute type, or two bf16, which come apart and together again in
// place. By tiles of floats, which widens and narrows across the vector, all-bf16 takes 1.25 times as long.
struct Pair {
  uint32_t bits;  // the value of lower address in the lower half
};
template <class Word> constexpr int kLanes = 1;
template <> constexpr int kLanes<Pair> = 2;

template <typename T> FUSED_HD void unpack(T word, T* x) { *x = word; }
template <typename T> FUSED_HD void pack(const T* x, T& word) { word = *x; }
FUSED_HD void unpack(Pair word, float* x) {
  x[0] = bit_cast<float>(word.bits << 16);
  x[1] = bit_cast<float>(word.bits & 0xffff0000u);
}

// store() of formats.h, but a NaN keeps its sign and payload: to look for one in every value takes a fifth of
// the time. quiet() mends that where there was one. Values that come of bf16 have no NaN so full that the
// addition would carry out of it.
FUSED_HD uint32_t rounded(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
FUSED_HD void pack(const float* x, Pair& word) {
  word.bits = (rounded(x[1]) & 0xffff0000u) | rounded(x[0]) >> 16;
}
// store_stochastic(), under the same terms.
FUSED_HD void pack(const float* x, Pair& word, uint32_t random0, uint32_t random1) {
  word.bits =
      ((bit_cast<uint32_t>(x[1]) + random1) & 0xffff0000u) | (bit_cast<uint32_t>(x[0]) + random0) >> 16;
}
template <typename T> void quiet(T*, int64_t) {}
inline void quiet(Pair* words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float x[2];
    BFloat16 low, high;
    unpack(words[i], x);
    store(x[0], low);
    store(x[1], high);
    words[i].bits = uint32_t(high.bits) << 16 | low.bits;
  }
}

// Returns whether a new parameter is NaN: every rule makes it NaN where it makes a state NaN. `random` has
// the words of stochastic rounding, one for each element.
template <class R, typename T, bool kRandom, class Word>
FUSED_HD bool update_words(const typename R::template Scalars<T>& s, int64_t n, Word* FUSED_RESTRICT p,
                           const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                           Word* FUSED_RESTRICT s2, const uint32_t* FUSED_RESTRICT random) {
  constexpr int lanes = kLanes<Word>;
  uint32_t nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    T xp[lanes], xg[lanes], x0[lanes] = {}, x1[lanes] = {}, x2[lanes] = {};
    unpack(p[i], xp);
    unpack(g[i], xg);
    if constexpr (R::kStates > 0) unpack(s0[i], x0);
    if constexpr (R::kStates > 1) unpack(s1[i], x1);
    if constexpr (R::kStates > 2) unpack(s2[i], x2);
    for (int l = 0; l < lanes; ++l) xp[l] = R::update(s, xp[l], xg[l], x0[l], x1[l], x2[l]);
    if constexpr (kRandom) {
      const uint32_t word0 = random[2 * i], word1 = random[2 * i + 1];
      pack(xp, p[i], for_parameter(word0), for_parameter(word1));
      if constexpr (R::kSecondMoment == 1)
        pack(x1, s1[i], for_second_moment(word0), for_second_moment(word1));
    } else {
      pack(xp, p[i]);
      if constexpr (R::kStates > 1) pack(x1, s1[i]);
    }
    if constexpr (lanes > 1) nan |= (p[i].bits & 0x7fff7fffu) + 0x007f007fu;
    if constexpr (R::kStates > 0) pack(x0, s0[i]);
    if constexpr (R::kStates > 2) pack(x2, s2[i]);
  }
  return nan & 0x80008000u;
}

template <class R, typename T, bool kRandom, class Word>
FUSED_HD void update_loop(const double* scalars, int64_t n, Word* FUSED_RESTRICT p,
                          const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                          Word* FUSED_RESTRICT s2, const uint32_t* FUSED_RESTRICT random) {
  using S = typename R::template Scalars<T>;
  static_assert(sizeof(S) == kRuleScalars * sizeof(T), "a rule has kRuleScalars scalars");
  T row[kRuleScalars];
  for (int i = 0; i < kRuleScalars; ++i)
    row[i] = scalars[i] != scalars[i] ? std::numeric_limits<T>::quiet_NaN() : T(scalars[i]);
  S s;
  std::memcpy(&s, row, sizeof(s));
  const int64_t tile = kLanes<Word> == 1 ? n : kTile;
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = std::min(tile, n - i);
    Word* x[] = {p + i, s0 + i, s1 + i, s2 + i};
    const uint32_t* words = kRandom ? random + 2 * i : nullptr;
    bool nan;
    // Two loops, in each of which lerp's choice is settled: in one, the compiler would divide for both.
    if (R::kStates > 1 && row[3] < T(0.5)) {
      nan = update_words<R, T, kRandom>(s, m, x[0], g + i, x[1], x[2], x[3], words);
    } else {
      nan = update_words<R, T, kRandom>(s, m, x[0], g + i, x[1], x[2], x[3], words);
    }
    for (int j = 0; nan && j <= R::kStates; ++j) quiet(x[j], m);
  }
}

template <class S, typename T> FUSED_HD void load_loop(const void* from, T* FUSED_RESTRICT to, int64_t n) {
  const S* FUSED_RESTRICT source = static_cast<const S*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = T(load(source[i]));
}

template <class S, typename T> FUSED_HD void store_loop(const T* FUSED_RESTRICT from, void* to, int64_t n) {
  S* FUSED_RESTRICT target = static_cast<S*>(to);
  for (int64_t i = 0; i < n; ++i) store(from[i], target[i]);
}

template <Master kMaster, class P>
FUSED_HD void read_loop(const void* p, const void* extra, float* FUSED_RESTRICT to, int64_t n) {
  using M = Mastered<kMaster>;
  const P* FUSED_RESTRICT high = static_cast<const P*>(p);
  const auto* FUSED_RESTRICT low = static_cast<const typename M::template Extra<P>*>(extra);
  for (int64_t i = 0; i < n; ++i) to[i] = M::read(high[i], low[i]);
}

template <Master kMaster, class P>
FUSED_HD void write_loop(const float* FUSED_RESTRICT from, void* p, void* extra, int64_t n) {
  using M = Mastered<kMaster>;
  P* FUSED_RESTRICT high = static_cast<P*>(p);
  auto* FUSED_RESTRICT low = static_cast<typename M::template Extra<P>*>(extra);
  for (int64_t i = 0; i < n; ++i) M::write(from[i], high[i], low[i]);
}

template <bool kSecond> FUSED_HD void random_loop(const float* FUSED_RESTRICT from, void* to,
                                                  const uint32_t* FUSED_RESTRICT words, int64_t n) {
  BFloat16* FUSED_RESTRICT target = static_cast<BFloat16*>(to);
  for (int64_t i = 0; i < n; ++i)
    store_stochastic(from[i], target[i], kSecond ? for_second_moment(words[i]) : for_parameter(words[i]));
}

// A block: kFull ones have a number of elements that the compiler knows, and no others look for NaN first.
template <class Q, bool kFull> FUSED_HD void decode_block(const uint8_t* FUSED_RESTRICT from, float unit,
                                                          float* FUSED_RESTRICT to, int64_t n) {
  if (kFull) n = kQuantBlock;
  uint8_t nan = 0;
  for (int64_t i = 0; i < n; ++i) nan |= from[i] == Q::kNaN;
  if (nan || !kFull) {
    for (int64_t i = 0; i < n; ++i) to[i] = decode<Q>(from[i], unit);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = Q::decode_number(from[i], unit);
  }
}

template <class Q>
FUSED_HD void decode_loop(const void* codes, const float* scales, float* FUSED_RESTRICT to, int64_t n) {
  const uint8_t* from = static_cast<const uint8_t*>(codes);
  for (; n >= kQuantBlock; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock)
    decode_block<Q, true>(from, Q::unit(*scales++), to, kQuantBlock);
  if (n) decode_block<Q, false>(from, Q::unit(*scales), to, n);
}

template <class Q, bool kFull, bool kRandom>
FUSED_HD void encode_block(const float* FUSED_RESTRICT from, uint8_t* FUSED_RESTRICT to, float* scale,
                           const uint32_t* FUSED_RESTRICT words, int64_t n) {
  if (kFull) n = kQuantBlock;
  int32_t most = 0;  // signed: so that AVX2 has a comparison
  for (int64_t i = 0; i < n; ++i) most = std::max(most, int32_t(magnitude_bits(from[i])));
  const bool finite = kFull && uint32_t(most) < kInfinite;
  if (!finite || uint32_t(most) < kLeastNormal) {
    most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, int32_t(scale_bits(from[i])));
  }
  *scale = bit_cast<float>(most);
  const float by = inverse(*scale);
  if (finite) {
    for (int64_t i = 0; i < n; ++i)
      to[i] = Q::template encode_number<kRandom>(from[i], by, kRandom ? words[i] : 0);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = encode<Q, kRandom>(from[i], by, kRandom ? words[i] : 0);
  }
}

template <class Q, bool kRandom>
FUSED_HD void encode_loop(const float* from, void* codes, float* scales, const uint32_t* words, int64_t n) {
  uint8_t* to = static_cast<uint8_t*>(codes);
  for (; n >= kQuantBlock; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock) {
    encode_block<Q, true, kRandom>(from, to, scales++, words, kQuantBlock);
    if (kRandom) words += kQuantBlock;
  }
  if (n) encode_block<Q, false, kRandom>(from, to, scales, words, n);
}

// ---- One instance per instruction set.

#define FUSED_ISA(Name, target_attribute)                                                                    \
  struct Name {                                                                                              \
    template <class R, typename T, class Word, bool kRandom = false> target_attribute static void            \
    update(const double* s, int64_t n, void* p, const void* g, void* const* x, const uint32_t* random) {     \
      update_loop<R, T, kRandom>(s, n, static_cast<Word*>(p), static_cast<const Word*>(g),                   \
                                 static_cast<Word*>(x[0]), static_cast<Word*>(x[1]),                         \
                                 static_cast<Word*>(x[2]), random);                                          \
    }                                                                                                        \
    template <Master kMaster, class P>                                                                       \
    target_attribute static void read(const void* p, const void* extra, float* to, int64_t n) {              \
      read_loop<kMaster, P>(p, extra, to, n);                                                                \
    }                                                                                                        \
    template <Master kMaster, class P>                                                                       \
    target_attribute static void write(const float* from, void* p, void* extra, int64_t n) {                 \
      write_loop<kMaster, P>(from, p, extra, n);                                                             \
    }                                                                                                        \
    template <bool kSecond>                                                                                  \
    target_attribute static void random(const float* from, void* to, const uint32_t* words, int64_t n) {     \
      random_loop<kSecond>(from, to, words, n);                                                              \
    }                                                                                                        \
    template <class Q>                                                                                       \
    target_attribute static void decode(const void* codes, const float* scales, float* to, int64_t n) {      \
      decode_loop<Q>(codes, scales, to, n);                                                                  \
    }                                                                                                        \
    template <class Q, bool kRandom> target_attribute static void                                            \
    encode(const float* from, void* codes, float* scales, const uint32_t* words, int64_t n) {                \
      encode_loop<Q, kRandom>(from, codes, scales, words, n);                                                \
    }                                                                                                        \
    template <class S, typename T> target_attribute static void load(const void* from, T* to, int64_t n) {   \
      load_loop<S, T>(from, to, n);                                                                          \
    }                                                                                                        \
    template <class S, typename T> target_attribute static void store(const T* from, void* to, int64_t n) {  \
      store_loop<S, T>(from, to, n);                                                                         \
    }                                                                                                        \
  };

FUSED_ISA(Generic, )
#ifdef FUSED_X86
FUSED_ISA(Avx2, __attribute__((target("avx2,fma"))))
FUSED_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

using Update = void (*)(const double*, int64_t, void*, const void*, void* const*, const uint32_t*);
template <typename T> struct Kernels {
  Update update[4];                           // by Rule: of streams in the compute type
  void (*load[4])(const void*, T*, int64_t);  // by Format
  void (*store[4])(const T*, void*, int64_t);
};

// Of what has 16 bits or fewer, for arithmetic in float.
struct Narrow {
  Update pairs[4], random_pairs[4];                               // by Rule: of pairs of bf16
  void (*read[4][2])(const void*, const void*, float*, int64_t);  // by Master; bf16, f16
  void (*write[4][2])(const float*, void*, void*, int64_t);
  void (*random[2])(const float*, void*, const uint32_t*, int64_t);          // parameter, second moment
  void (*decode[2])(const void*, const float*, float*, int64_t);             // first moment, second
  void (*encode[4])(const float*, void*, float*, const uint32_t*, int64_t);  // and stochastically
  // Words of so many groups of four elements: seed, first group, step, index.
  void (*philox)(uint64_t, uint64_t, uint32_t, uint32_t, uint32_t*, int64_t);
};

void philox_loop(uint64_t seed, uint64_t group, uint32_t step, uint32_t index, uint32_t* to, int64_t groups) {
  for (; groups > 0; --groups, to += 4) {
    const Words words = philox(seed, group++, step, index);
    std::memcpy(to, words.x, sizeof(words));
  }
}

// Storage narrower than fp32 is refused for fp64 arithmetic (it would round twice): plan.py tells.
#define FUSED_RULES(Isa, ...)                                                                                \
  {Isa::template update<Adam<false>, __VA_ARGS__>, Isa::template update<Adam<true>, __VA_ARGS__>,            \
   Isa::template update<Sgd<false>, __VA_ARGS__>, Isa::template update<Sgd<true>, __VA_ARGS__>}
#define FUSED_MASTERS(function)                                                                              \
  {                                                                                                          \
    {}, {function<Master::kahan, BFloat16>}, {function<Master::split16, BFloat16>}, {                        \
      function<Master::fp32, BFloat16>, function<Master::fp32, Float16>                                      \
    }                                                                                                        \
  }
template <class Isa> constexpr Kernels<float> kernels(float) {
  return {FUSED_RULES(Isa, float, float),
          {nullptr, Isa::template load<double, float>, Isa::template load<BFloat16, float>,
           Isa::template load<Float16, float>},
          {nullptr, Isa::template store<double, float>, Isa::template store<BFloat16, float>,
           Isa::template store<Float16, float>}};
}
template <class Isa> constexpr Kernels<double> kernels(double) {
  return {FUSED_RULES(Isa, double, double),
          {Isa::template load<float, double>, nullptr, Isa::template load<BFloat16, double>,
           Isa::template load<Float16, double>},
          {Isa::template store<float, double>, nullptr, nullptr, nullptr}};
}
template <class Isa> constexpr Narrow narrow() {
  return {FUSED_RULES(Isa, float, Pair),
          FUSED_RULES(Isa, float, Pair, true),
          FUSED_MASTERS(Isa::template read),
          FUSED_MASTERS(Isa::template write),
          {Isa::template random<false>, Isa::template random<true>},
          {Isa::template decode<First>, Isa::template decode<Second>},
          {Isa::template encode<First, false>, Isa::template encode<Second, false>,
           Isa::template encode<First, true>, Isa::template encode<Second, true>},
          philox_loop};
}

#ifdef FUSED_X86
// The processor's own conversions, which no loop is turned into; the loops above take 7 times as long.
__attribute__((target("avx2,fma,f16c"))) void load_f16c(const void* from, float* to, int64_t n) {
  const Float16* source = static_cast<const Float16*>(from);
  for (; n >= 8; n -= 8, source += 8, to += 8)
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
  load_loop<Float16, float>(source, to, n);
}
__attribute__((target("avx2,fma,f16c"))) void store_f16c(const float* from, void* to, int64_t n) {
  Float16* target = static_cast<Float16*>(to);
  const __m256 sign = _mm256_set1_ps(-0.0f), nan = _mm256_set1_ps(bit_cast<float>(0x7fc00000u));
  for (; n >= 8; n -= 8, from += 8, target += 8) {
    __m256 x = _mm256_loadu_ps(from);  // a NaN loses its payload, as in formats.h
    x = _mm256_blendv_ps(x, _mm256_or_ps(_mm256_and_ps(x, sign), nan), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  store_loop<Float16, float>(from, target, n);
}

// Four groups at once, each in the low halves of 64 bits, of which the multiplication reads no more. Four
// such vectors are under way together, since a round is a chain of 6 cycles: two take 1.2 times as long.
__attribute__((target("avx2,fma"))) void philox_avx2(uint64_t seed, uint64_t group, uint32_t step,
                                                     uint32_t index, uint32_t* to, int64_t groups) {
  constexpr int kChains = 4, kRounds = 10;
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
#pragma GCC unroll 10
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
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_permute2x128_si256(even, odd, 0x31));
      to += 16;
    }
  }
  philox_loop(seed, group, step, index, to, groups);
}

// Codes of full blocks of numbers, 8 at a time; all others go to the loops above, which take 1.6 times as
// long: they widen and narrow by halves.
#define FUSED_AVX2 __attribute__((target("avx2,fma")))
FUSED_AVX2 inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

FUSED_AVX2 inline __m256 decode8(First, const uint8_t* from, __m256 unit) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256 c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  return _mm256_mul_ps(_mm256_mul_ps(c, magnitude(c)), unit);
}
FUSED_AVX2 inline __m256 decode8(Second, const uint8_t* from, __m256 unit) {
  const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(c, _mm256_set1_epi32(762)), 20);
  const __m256 zero = _mm256_castsi256_ps(_mm256_cmpeq_epi32(c, _mm256_setzero_si256()));
  return _mm256_andnot_ps(zero, _mm256_mul_ps(_mm256_castsi256_ps(bits), unit));
}

template <class Q> FUSED_AVX2 void decode_avx2(const void* codes, const float* scales, float* to, int64_t n) {
  const uint8_t* from = static_cast<const uint8_t*>(codes);
  for (; n > 0; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock, ++scales) {
    __m256i nan = _mm256_setzero_si256();
    for (int i = 0; i < kQuantBlock && n >= kQuantBlock; i += 32) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      nan = _mm256_or_si256(nan, _mm256_cmpeq_epi8(c, _mm256_set1_epi8(char(Q::kNaN))));
    }
    if (n < kQuantBlock || !_mm256_testz_si256(nan, nan)) {
      decode_loop<Q>(from, scales, to, std::min<int64_t>(n, kQuantBlock));
      continue;
    }
    const __m256 unit = _mm256_set1_ps(Q::unit(*scales));
    for (int i = 0; i < kQuantBlock; i += 8) _mm256_storeu_ps(to + i, decode8(Q(), from + i, unit));
  }
}

template <bool kRandom> FUSED_AVX2 inline __m256i encode8(First, __m256 x, __m256 by, const uint32_t* words) {
  const __m256 ratio = _mm256_mul_ps(magnitude(x), by);
  const __m256 root = _mm256_mul_ps(_mm256_sqrt_ps(ratio), _mm256_set1_ps(127.0f));
  __m256i c = _mm256_cvtps_epi32(root);
  if constexpr (kRandom) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i bits = _mm256_srli_epi32(_mm256_mullo_epi32(word, _mm256_set1_epi32(int(0x9e3779b9u))), 16);
    const __m256 drawn = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(0.5f)),
                                       _mm256_set1_ps(0x1p-16f));
    c = _mm256_cvttps_epi32(root);
    const __m256 below = _mm256_cvtepi32_ps(c);
    const __m256 rest =
        _mm256_sub_ps(_mm256_mul_ps(ratio, _mm256_set1_ps(16129.0f)), _mm256_mul_ps(below, below));
    const __m256 width = _mm256_add_ps(_mm256_add_ps(below, below), _mm256_set1_ps(1.0f));
    const __m256 up = _mm256_cmp_ps(rest, _mm256_mul_ps(drawn, width), _CMP_GT_OQ);
    c = _mm256_min_epi32(_mm256_sub_epi32(c, _mm256_castps_si256(up)), _mm256_set1_epi32(127));
  }
  return _mm256_sign_epi32(c, _mm256_castps_si256(x));
}
// Without what only a negative value needs, which no block has that comes here, and without the upper bound,
// which a ratio of 1 does not pass.
template <bool kRandom>
FUSED_AVX2 inline __m256i encode8(Second, __m256 x, __m256 by, const uint32_t* words) {
  const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(x, by));
  __m256i add = _mm256_set1_epi32(int(Second::added(false, 0)) - (762 << 20));
  if constexpr (kRandom) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i random = _mm256_slli_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0xffff)), 4);
    add = _mm256_add_epi32(random, _mm256_set1_epi32(8 - (762 << 20)));
  }
  const __m256i c = _mm256_srai_epi32(_mm256_add_epi32(bits, add), 20);
  return _mm256_max_epi32(c, _mm256_min_epu32(_mm256_castps_si256(x), _mm256_set1_epi32(1)));
}

FUSED_AVX2 inline __m256 unsigned_of(First, __m256 x) { return magnitude(x); }
FUSED_AVX2 inline __m256 unsigned_of(Second, __m256 x) { return x; }
// The largest magnitude of a full block, as an integer; beyond all numbers where a second moment is negative.
template <class Q> FUSED_AVX2 inline uint32_t largest_of(Q q, const float* from) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < kQuantBlock; i += 8)
    most = _mm256_max_epu32(most, _mm256_castps_si256(unsigned_of(q, _mm256_loadu_ps(from + i))));
  __m128i last = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  last = _mm_max_epu32(last, _mm_shuffle_epi32(last, 0x4e));
  last = _mm_max_epu32(last, _mm_shuffle_epi32(last, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(last));
}

// n: at most kTile.
template <class Q, bool kRandom>
FUSED_AVX2 void encode_avx2(const float* from, void* codes, float* scales, const uint32_t* words, int64_t n) {
  uint8_t* to = static_cast<uint8_t*>(codes);
  // All scales first: each takes a chain of 40 cycles, in which the others are under way.
  const int64_t full = n / kQuantBlock;
  uint32_t largest[kTile / kQuantBlock];
  float inverses[kTile / kQuantBlock];
  for (int64_t b = 0; b < full; ++b) {
    largest[b] = largest_of(Q(), from + b * kQuantBlock);
    inverses[b] = inverse(bit_cast<float>(largest[b]));
  }
  for (int64_t b = 0; n > 0; ++b, n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock, ++scales) {
    if (b >= full || largest[b] < kLeastNormal || largest[b] >= kInfinite) {
      encode_loop<Q, kRandom>(from, to, scales, words, std::min<int64_t>(n, kQuantBlock));
    } else {
      *scales = bit_cast<float>(largest[b]);
      const __m256 by = _mm256_set1_ps(inverses[b]);
      for (int i = 0; i < kQuantBlock; i += 32) {
        __m256i c[4];
        for (int k = 0; k < 4; ++k)
          c[k] = encode8<kRandom>(Q(), _mm256_loadu_ps(from + i + 8 * k), by, words + i + 8 * k);
        // Packing saturates, so that codes go by where they have a sign, and comes out by halves.
        const __m256i low = _mm256_packs_epi32(c[0], c[1]), high = _mm256_packs_epi32(c[2], c[3]);
        __m256i bytes =
            Q::kNaN == First::kNaN ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bytes);
      }
    }
    if constexpr (kRandom) words += kQuantBlock;
  }
}

template <class Isa> constexpr Narrow narrow_avx2() {
  Narrow k = narrow<Isa>();
  k.philox = philox_avx2;
  k.decode[0] = decode_avx2<First>, k.decode[1] = decode_avx2<Second>;
  k.encode[0] = encode_avx2<First, false>, k.encode[1] = encode_avx2<Second, false>;
  k.encode[2] = encode_avx2<First, true>, k.encode[3] = encode_avx2<Second, true>;
  return k;
}
template <class Isa> constexpr Kernels<float> kernels_f16c() {
  Kernels<float> k = kernels<Isa>(0.0f);
  k.load[int(Format::f16)] = load_f16c;
  k.store[int(Format::f16)] = store_f16c;
  return k;
}
#endif

struct IsaTable {
  Kernels<float> f32;
  Kernels<double> f64;
  Narrow narrow;
};
constexpr IsaTable kIsas[] = {
    {kernels<Generic>(0.0f), kernels<Generic>(0.0), narrow<Generic>()},
#ifdef FUSED_X86
    {kernels_f16c<Avx2>(), kernels<Avx2>(0.0), narrow_avx2<Avx2>()},
    {kernels_f16c<Avx512>(), kernels<Avx512>(0.0), narrow_avx2<Avx512>()},
#endif
};

// ---- A span of a row: streams already in the compute type are used where they are, others by tiles.

template <typename T> constexpr Format kNative = sizeof(T) == 4 ? Format::f32 : Format::f64;
constexpr int64_t kItemsize[] = {4, 8, 2, 2, 1};

const Kernels<float>& kernels_of(const IsaTable& isa, float) { return isa.f32; }
const Kernels<double>& kernels_of(const IsaTable& isa, double) { return isa.f64; }

template <typename T> struct Stream {
  const IsaTable* isa;
  char* base;
  Format format;
  T* tile;
  bool random = false, second = false;  // rounded stochastically; a second moment
  Master master = Master::none;
  char* extra = nullptr;
  float* scales = nullptr;

  bool native() const { return format == kNative<T>; }
  char* at(int64_t i) const { return base + i * kItemsize[int(format)]; }
  char* extra_at(int64_t i) const { return extra + i * (master == Master::fp32 ? 4 : 2); }

  T* open(int64_t i, int64_t n) const {
    if (native()) return reinterpret_cast<T*>(at(i));
    if constexpr (sizeof(T) == 4) {
      if (master != Master::none) {
        isa->narrow.read[int(master)][format == Format::f16](at(i), extra_at(i), tile, n);
        return tile;
      }
      if (format == Format::i8) {
        isa->narrow.decode[second](at(i), scales + i / kQuantBlock, tile, n);
        return tile;
      }
    }
    kernels_of(*isa, T()).load[int(format)](at(i), tile, n);
    return tile;
  }

  // `words` are those of stochastic rounding, where any stream of the row is rounded so.
  void close(int64_t i, int64_t n, const uint32_t* words) const {
    if (native()) return;
    if constexpr (sizeof(T) == 4) {
      const Narrow& k = isa->narrow;
      if (master != Master::none)
        return k.write[int(master)][format == Format::f16](tile, at(i), extra_at(i), n);
      if (format == Format::i8)
        return k.encode[second + 2 * random](tile, at(i), scales + i / kQuantBlock, words, n);
      if (random) return k.random[second](tile, at(i), words, n);
    }
    kernels_of(*isa, T()).store[int(format)](tile, at(i), n);
  }
};

// The words of elements [i, i + n) of a row; `to` has room for 7 more.
void draw(const Narrow& k, const Row& row, uint32_t step, int64_t i, int64_t n, uint32_t* to) {
  while (n > 0) {
    const int64_t lap = i / row.run, m = std::min(n, (lap + 1) * row.run - i);
    const uint64_t first = uint64_t(row.offset + i + lap * row.skip);
    const int64_t lead = first % 4;
    k.philox(row.seed, first / 4, step, row.index, to, (lead + m + 3) / 4);
    if (lead) std::memmove(to, to + lead, m * sizeof(*to));
    to += m, i += m, n -= m;
  }
}

int states_of(Rule rule) {
  constexpr int states[] = {Adam<false>::kStates, Adam<true>::kStates, Sgd<false>::kStates,
                            Sgd<true>::kStates};
  return states[int(rule)];
}
int second_moment_of(Rule rule) {
  return rule == Rule::adam || rule == Rule::adam_amsgrad ? Adam<false>::kSecondMoment
                                                          : Sgd<false>::kSecondMoment;
}

// The beginning of a row. Small tensors end before the processor sees that they are streams: without this a
// step of 10,000 of 64 elements takes 1.2 times as long.
FUSED_HD void prefetch(const Row& row) {
  const auto lines = [&row](const void* stream, Format format) {
    const int64_t bytes = std::min(kBlock, row.numel) * kItemsize[int(format)];
    for (int64_t i = 0; i < bytes; i += 64) FUSED_PREFETCH(static_cast<const char*>(stream) + i);
  };
  lines(row.p, row.p_format);
  lines(row.g, row.g_format);
  for (int j = 0; j < states_of(row.rule); ++j) lines(row.state[j], row.state_format);
}

template <typename T>
void step_span(const IsaTable& isa, const Row& row, const double* scalars, int64_t begin, int64_t end) {
  alignas(64) T tiles[2 + kMaxStates][kTile];
  alignas(64) uint32_t words[2 * kTile + 7];
  const int states = states_of(row.rule), second = second_moment_of(row.rule);
  const uint32_t step = uint32_t(scalars[kStep]);
  Stream<T> p{&isa, static_cast<char*>(row.p), row.p_format, tiles[0]};
  const Stream<T> g{&isa, static_cast<char*>(const_cast<void*>(row.g)), row.g_format, tiles[1]};
  Stream<T> x[kMaxStates];
  p.master = row.master, p.extra = static_cast<char*>(row.extra);
  p.random = row.stochastic && p.format == Format::bf16 && p.master == Master::none;
  bool native = p.native() && g.native(), random = p.random;
  bool bf16 = p.format == Format::bf16 && p.master == Master::none && g.format == Format::bf16;
  for (int j = 0; j < states; ++j) {
    x[j] = {&isa, static_cast<char*>(row.state[j]), row.state_format, tiles[2 + j]};
    x[j].second = j == second;
    x[j].random =
        row.stochastic && (x[j].format == Format::i8 || (x[j].second && x[j].format == Format::bf16));
    if (x[j].format == Format::i8) x[j].scales = row.scales[j];
    random = random || x[j].random;
    native = native && x[j].native();
    bf16 = bf16 && x[j].format == Format::bf16;
  }
  if (bf16) {
    const int64_t even = end - (end - begin) % 2, most = random ? 2 * kTile : even - begin;
    const Update* const pairs = random ? isa.narrow.random_pairs : isa.narrow.pairs;
    for (int64_t n; begin < even; begin += n) {
      n = std::min(most, even - begin);
      void* s[kMaxStates] = {};
      for (int j = 0; j < states; ++j) s[j] = x[j].at(begin);
      if (random) draw(isa.narrow, row, step, begin, n, words);
      pairs[int(row.rule)](scalars, n / 2, p.at(begin), g.at(begin), s, words);
    }
  }
  const int64_t stride = native ? end - begin : kTile;
  for (int64_t i = begin; i < end; i += stride) {
    const int64_t n = std::min(stride, end - i);
    void* s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = x[j].open(i, n);
    kernels_of(isa, T()).update[int(row.rule)](scalars, n, p.open(i, n), g.open(i, n), s, nullptr);
    if (random) draw(isa.narrow, row, step, i, n, words);
    p.close(i, n, words);
    for (int j = 0; j < states; ++j) x[j].close(i, n, words);
  }
}

}  // namespace

const char* const* cpu_isas() {
  static const char* names[4] = {"generic"};
#ifdef FUSED_X86
  static const bool once = [] {
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;  // "f16c" is no name that every compiler knows here
    __get_cpuid(1, &a, &b, &c, &d);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C)) {
      names[1] = "avx2";
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        names[2] = "avx512";
    }
    return true;
  }();
  (void)once;
#endif
  return names;
}

void step_cpu(const Row* rows, int64_t n, const double* scalars, int isa) {
  std::vector<int64_t> ends(n);  // blocks up to and including each row
  int64_t blocks = 0;
  for (int64_t r = 0; r < n; ++r) ends[r] = blocks += (rows[r].numel + kBlock - 1) / kBlock;

  const auto run = [&](int64_t first, int64_t last) {
    int64_t r = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    for (int64_t b = first; b < last; b = ends[r++]) {
      const Row& row = rows[r];
      const int64_t start = r ? ends[r - 1] : 0;
      const int64_t begin = (b - start) * kBlock, end = std::min(row.numel, (last - start) * kBlock);
      if (begin == 0 && r + kRowsAhead < n) prefetch(rows[r + kRowsAhead]);
      if (begin >= end) continue;
      const double* s = scalars + int64_t(row.scalars) * kScalars;
      if (row.p_format == Format::f64) {
        step_span<double>(kIsas[isa], row, s, begin, end);
      } else {
        step_span<float>(kIsas[isa], row, s, begin, end);
      }
    }
  };
#ifdef _OPENMP
  if (blocks * kBlock > kSerial && !omp_in_parallel()) {
#pragma omp parallel
    {
      const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
      run(blocks * t / threads, blocks * (t + 1) / threads);
    }
    return;
  }
#endif
  run(0, blocks);
}

}  // namespace fused_adamw
