// The ceiling of a step on the CPU: its memory traffic, in one parallel region like the step's own.
#include "stream.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_adamw {
namespace {

#if defined(__GNUC__)
#define FUSED_INLINE inline __attribute__((always_inline))
typedef uint64_t Vector __attribute__((vector_size(16), aligned(8)));
#else
#define FUSED_INLINE inline
struct Vector {
  uint64_t low, high;
  Vector operator+(Vector other) const { return {low + other.low, high + other.high}; }
};
#endif

// One or two cache lines, in vectors that the processor has registers for: the sums stay in four of them.
template <class V> struct Lines {
  V v[4];
  FUSED_INLINE void add(const Lines& x) {
    for (int k = 0; k < 4; ++k) v[k] = v[k] + x.v[k];
  }
};
template <class V> FUSED_INLINE Lines<V> halves_swapped(const Lines<V>& x) {
  return {{x.v[2], x.v[3], x.v[0], x.v[1]}};
}

template <class V>
FUSED_INLINE void run(const Array* arrays, int n, int written, int64_t first, int64_t last) {
  struct Place {
    Lines<V>* at;
    int64_t count;  // in a block
  } places[kMaxArrays];
  for (int a = 0; a < n; ++a) {
    const int64_t count = arrays[a].width * kStreamBlock / int64_t(sizeof(Lines<V>));
    places[a] = {reinterpret_cast<Lines<V>*>(arrays[a].data) + first * count, count};
  }
  for (int64_t b = first; b < last; ++b) {
    Lines<V> sum = {};
    for (int a = 0; a < n; ++a)
      for (int64_t i = 0; i < places[a].count; ++i) sum.add(places[a].at[i]);
    if constexpr (sizeof(Lines<V>) == 128) sum.add(halves_swapped(sum));
    for (int a = 0; a < n; ++a) {
      Lines<V>* const x = places[a].at;
      for (int64_t i = 0; a < written && i < places[a].count; ++i) x[i].add(sum);
      places[a].at += places[a].count;
    }
  }
}

using Run = void (*)(const Array*, int, int, int64_t, int64_t);
void run_generic(const Array* arrays, int n, int written, int64_t first, int64_t last) {
  run<Vector>(arrays, n, written, first, last);
}
#if defined(__x86_64__) && defined(__GNUC__)
typedef uint64_t Vector256 __attribute__((vector_size(32), aligned(8)));
__attribute__((target("avx2"))) void run_avx2(const Array* arrays, int n, int written, int64_t first,
                                              int64_t last) {
  run<Vector256>(arrays, n, written, first, last);
}
Run fastest() { return __builtin_cpu_supports("avx2") ? run_avx2 : run_generic; }
#else
Run fastest() { return run_generic; }
#endif

}  // namespace

void stream_cpu(const Array* arrays, int n, int written, int64_t blocks) {
  const Run run = fastest();
#ifdef _OPENMP
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    run(arrays, n, written, blocks * t / threads, blocks * (t + 1) / threads);
  }
#else
  run(arrays, n, written, 0, blocks);
#endif
}

}  // namespace fused_adamw
