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

// Threads are given whole blocks of 64 elements: no two write the same cache line of an aligned tensor.
constexpr int64_t kBlock = 64;
// Narrow formats are converted through tiles that stay in the L1 cache: at most 5 of 4 KiB.
constexpr int64_t kTile = 512;
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

// Returns whether a new parameter is NaN: every rule makes it NaN where it makes a state NaN.
template <class R, typename T, class Word>
FUSED_HD bool update_words(const typename R::template Scalars<T>& s, int64_t n, Word* FUSED_RESTRICT p,
                           const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                           Word* FUSED_RESTRICT s2) {
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
    pack(xp, p[i]);
    if constexpr (lanes > 1) nan |= (p[i].bits & 0x7fff7fffu) + 0x007f007fu;
    if constexpr (R::kStates > 0) pack(x0, s0[i]);
    if constexpr (R::kStates > 1) pack(x1, s1[i]);
    if constexpr (R::kStates > 2) pack(x2, s2[i]);
  }
  return nan & 0x80008000u;
}

template <class R, typename T, class Word>
FUSED_HD void update_loop(const double* scalars, int64_t n, Word* FUSED_RESTRICT p,
                          const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                          Word* FUSED_RESTRICT s2) {
  using S = typename R::template Scalars<T>;
  static_assert(sizeof(S) == kScalars * sizeof(T), "a scalar row is kScalars values");
  T row[kScalars];
  for (int i = 0; i < kScalars; ++i)
    row[i] = scalars[i] != scalars[i] ? std::numeric_limits<T>::quiet_NaN() : T(scalars[i]);
  S s;
  std::memcpy(&s, row, sizeof(s));
  const int64_t tile = kLanes<Word> == 1 ? n : kTile;
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = std::min(tile, n - i);
    Word* x[] = {p + i, s0 + i, s1 + i, s2 + i};
    bool nan;
    // Two loops, in each of which lerp's choice is settled: in one, the compiler would divide for both.
    if (R::kStates > 1 && row[3] < T(0.5)) {
      nan = update_words<R, T>(s, m, x[0], g + i, x[1], x[2], x[3]);
    } else {
      nan = update_words<R, T>(s, m, x[0], g + i, x[1], x[2], x[3]);
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

// ---- One instance per instruction set.

#define FUSED_ISA(Name, target_attribute)                                                                    \
  struct Name {                                                                                              \
    template <class R, typename T, class Word> target_attribute static void                                  \
    update(const double* s, int64_t n, void* p, const void* g, void* const* x) {                             \
      update_loop<R, T>(s, n, static_cast<Word*>(p), static_cast<const Word*>(g), static_cast<Word*>(x[0]),  \
                        static_cast<Word*>(x[1]), static_cast<Word*>(x[2]));                                 \
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

using Update = void (*)(const double*, int64_t, void*, const void*, void* const*);
template <typename T> struct Kernels {
  Update update[4];                           // by Rule: of streams in the compute type
  Update pairs[4];                            // of pairs of bf16
  void (*load[4])(const void*, T*, int64_t);  // by Format
  void (*store[4])(const T*, void*, int64_t);
};

// Storage narrower than fp32 is refused for fp64 arithmetic (it would round twice): plan.py tells.
#define FUSED_RULES(Isa, T, Word)                                                                            \
  {Isa::template update<Adam<false>, T, Word>, Isa::template update<Adam<true>, T, Word>,                    \
   Isa::template update<Sgd<false>, T, Word>, Isa::template update<Sgd<true>, T, Word>}
template <class Isa> constexpr Kernels<float> kernels(float) {
  return {FUSED_RULES(Isa, float, float),
          FUSED_RULES(Isa, float, Pair),
          {nullptr, Isa::template load<double, float>, Isa::template load<BFloat16, float>,
           Isa::template load<Float16, float>},
          {nullptr, Isa::template store<double, float>, Isa::template store<BFloat16, float>,
           Isa::template store<Float16, float>}};
}
template <class Isa> constexpr Kernels<double> kernels(double) {
  return {FUSED_RULES(Isa, double, double),
          {},
          {Isa::template load<float, double>, nullptr, Isa::template load<BFloat16, double>,
           Isa::template load<Float16, double>},
          {Isa::template store<float, double>, nullptr, nullptr, nullptr}};
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
};
constexpr IsaTable kIsas[] = {
    {kernels<Generic>(0.0f), kernels<Generic>(0.0)},
#ifdef FUSED_X86
    {kernels_f16c<Avx2>(), kernels<Avx2>(0.0)},
    {kernels_f16c<Avx512>(), kernels<Avx512>(0.0)},
#endif
};

// ---- A span of a row: streams already in the compute type are used where they are, others by tiles.

template <typename T> constexpr Format kNative = sizeof(T) == 4 ? Format::f32 : Format::f64;
constexpr int64_t kItemsize[] = {4, 8, 2, 2};

template <typename T> struct Stream {
  char* base;
  Format format;
  T* tile;

  bool native() const { return format == kNative<T>; }
  char* at(int64_t i) const { return base + i * kItemsize[int(format)]; }
  T* open(const Kernels<T>& k, int64_t i, int64_t n) const {
    if (native()) return reinterpret_cast<T*>(at(i));
    k.load[int(format)](at(i), tile, n);
    return tile;
  }
  void close(const Kernels<T>& k, int64_t i, int64_t n) const {
    if (!native()) k.store[int(format)](tile, at(i), n);
  }
};

int states_of(Rule rule) {
  constexpr int states[] = {Adam<false>::kStates, Adam<true>::kStates, Sgd<false>::kStates,
                            Sgd<true>::kStates};
  return states[int(rule)];
}

// The beginning of a row. Small tensors end before the processor sees that they are streams: the launch of
// 10,000 of 64 elements takes two thirds of the time.
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
void step_span(const Kernels<T>& k, const Row& row, const double* scalars, int64_t begin, int64_t end) {
  alignas(64) T tiles[2 + kMaxStates][kTile];
  const int states = states_of(row.rule);
  const Stream<T> p{static_cast<char*>(row.p), row.p_format, tiles[0]};
  const Stream<T> g{static_cast<char*>(const_cast<void*>(row.g)), row.g_format, tiles[1]};
  Stream<T> x[kMaxStates];
  bool native = p.native() && g.native();
  bool bf16 = p.format == Format::bf16 && g.format == Format::bf16;
  for (int j = 0; j < states; ++j) {
    x[j] = {static_cast<char*>(row.state[j]), row.state_format, tiles[2 + j]};
    native = native && x[j].native();
    bf16 = bf16 && x[j].format == Format::bf16;
  }
  if (bf16) {
    void* s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = x[j].at(begin);
    k.pairs[int(row.rule)](scalars, (end - begin) / 2, p.at(begin), g.at(begin), s);
    begin = end - (end - begin) % 2;
  }
  const int64_t stride = native ? end - begin : kTile;
  for (int64_t i = begin; i < end; i += stride) {
    const int64_t n = std::min(stride, end - i);
    void* s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = x[j].open(k, i, n);
    k.update[int(row.rule)](scalars, n, p.open(k, i, n), g.open(k, i, n), s);
    p.close(k, i, n);
    for (int j = 0; j < states; ++j) x[j].close(k, i, n);
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
        step_span<double>(kIsas[isa].f64, row, s, begin, end);
      } else {
        step_span<float>(kIsas[isa].f32, row, s, begin, end);
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
