// The CPU backend: one parallel region over all tensors, the rule per element, compiled once for each
// instruction set and chosen at run time.
#include <algorithm>
#include <vector>

#include "step.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__)
#define FUSED_RESTRICT __restrict__
#define FUSED_PREFETCH(address) __builtin_prefetch(address)
#else
#define FUSED_RESTRICT
#define FUSED_PREFETCH(address)
#endif

namespace fused_adamw {
namespace {

// Threads are given whole blocks of 64 elements: no two write the same cache line of an aligned tensor.
constexpr int64_t kBlock = 64;
// Narrow formats are converted through tiles that stay in the L1 cache: at most 5 of 4 KiB.
constexpr int64_t kTile = 512;
// A parallel region costs about as much as this many elements of one thread.
constexpr int64_t kSerial = 16384;
// Bytes ahead of the loop; 0 to 6 % on the large cases, and never a loss.
constexpr int64_t kAhead = 2048;

// ---- The loops, written once. Inlined into a function per instruction set, they are vectorised for it.

template <class R, typename T>
FUSED_HD void update_loop(const double* scalars, int64_t n, T* FUSED_RESTRICT p, const T* FUSED_RESTRICT g,
                          T* FUSED_RESTRICT s0, T* FUSED_RESTRICT s1, T* FUSED_RESTRICT s2) {
  using S = typename R::template Scalars<T>;
  static_assert(sizeof(S) == kScalars * sizeof(T), "a scalar row is kScalars values");
  T row[kScalars];
  for (int i = 0; i < kScalars; ++i) row[i] = T(scalars[i]);
  S s;
  std::memcpy(&s, row, sizeof(s));
  const auto element = [&](int64_t i) __attribute__((always_inline)) {
    T x0{}, x1{}, x2{};
    if constexpr (R::kStates > 0) x0 = s0[i];
    if constexpr (R::kStates > 1) x1 = s1[i];
    if constexpr (R::kStates > 2) x2 = s2[i];
    p[i] = R::update(s, p[i], g[i], x0, x1, x2);
    if constexpr (R::kStates > 0) s0[i] = x0;
    if constexpr (R::kStates > 1) s1[i] = x1;
    if constexpr (R::kStates > 2) s2[i] = x2;
  };
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    constexpr int64_t ahead = kAhead / int64_t(sizeof(T)), line = 64 / int64_t(sizeof(T));
    for (int64_t k = ahead; k < ahead + kBlock; k += line) {
      FUSED_PREFETCH(p + i + k);
      FUSED_PREFETCH(g + i + k);
      if constexpr (R::kStates > 0) FUSED_PREFETCH(s0 + i + k);
      if constexpr (R::kStates > 1) FUSED_PREFETCH(s1 + i + k);
      if constexpr (R::kStates > 2) FUSED_PREFETCH(s2 + i + k);
    }
    for (int64_t k = i; k < i + kBlock; ++k) element(k);
  }
  for (; i < n; ++i) element(i);
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
    template <class R, typename T>                                                                           \
    target_attribute static void update(const double* s, int64_t n, T* p, const T* g, T* const* x) {         \
      update_loop<R, T>(s, n, p, g, x[0], x[1], x[2]);                                                       \
    }                                                                                                        \
    template <class S, typename T> target_attribute static void load(const void* from, T* to, int64_t n) {   \
      load_loop<S, T>(from, to, n);                                                                          \
    }                                                                                                        \
    template <class S, typename T> target_attribute static void store(const T* from, void* to, int64_t n) {  \
      store_loop<S, T>(from, to, n);                                                                         \
    }                                                                                                        \
  };

FUSED_ISA(Generic, )
#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
FUSED_ISA(Avx2, __attribute__((target("avx2,fma"))))
FUSED_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

template <typename T> struct Kernels {
  void (*update[4])(const double*, int64_t, T*, const T*, T* const*);  // by Rule
  void (*load[4])(const void*, T*, int64_t);                           // by Format
  void (*store[4])(const T*, void*, int64_t);
};

// Storage narrower than fp32 is refused for fp64 arithmetic (it would round twice): plan.py tells.
template <class Isa> constexpr Kernels<float> kernels(float) {
  return {{Isa::template update<Adam<false>, float>, Isa::template update<Adam<true>, float>,
           Isa::template update<Sgd<false>, float>, Isa::template update<Sgd<true>, float>},
          {nullptr, Isa::template load<double, float>, Isa::template load<BFloat16, float>,
           Isa::template load<Float16, float>},
          {nullptr, Isa::template store<double, float>, Isa::template store<BFloat16, float>,
           Isa::template store<Float16, float>}};
}
template <class Isa> constexpr Kernels<double> kernels(double) {
  return {{Isa::template update<Adam<false>, double>, Isa::template update<Adam<true>, double>,
           Isa::template update<Sgd<false>, double>, Isa::template update<Sgd<true>, double>},
          {Isa::template load<float, double>, nullptr, Isa::template load<BFloat16, double>,
           Isa::template load<Float16, double>},
          {Isa::template store<float, double>, nullptr, nullptr, nullptr}};
}

struct IsaTable {
  Kernels<float> f32;
  Kernels<double> f64;
};
#define FUSED_TABLE(Isa) {kernels<Isa>(0.0f), kernels<Isa>(0.0)}
constexpr IsaTable kIsas[] = {
    FUSED_TABLE(Generic),
#ifdef FUSED_X86
    FUSED_TABLE(Avx2),
    FUSED_TABLE(Avx512),
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

template <typename T>
void step_span(const Kernels<T>& k, const Row& row, const double* scalars, int64_t begin, int64_t end) {
  alignas(64) T tiles[2 + kMaxStates][kTile];
  const int states = states_of(row.rule);
  const Stream<T> p{static_cast<char*>(row.p), row.p_format, tiles[0]};
  const Stream<T> g{static_cast<char*>(const_cast<void*>(row.g)), row.g_format, tiles[1]};
  Stream<T> x[kMaxStates];
  bool native = p.native() && g.native();
  for (int j = 0; j < states; ++j) {
    x[j] = {static_cast<char*>(row.state[j]), row.state_format, tiles[2 + j]};
    native = native && x[j].native();
  }
  const int64_t stride = native ? end - begin : kTile;
  for (int64_t i = begin; i < end; i += stride) {
    const int64_t n = std::min(stride, end - i);
    T* s[kMaxStates] = {};
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
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
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
