// The ceiling of a step on the CPU: its memory traffic with next to nothing computed, in one parallel region
// like the step's own. bench/stream.py builds it and calls stream_cpu().
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kBlock = 128;  // elements: two lines of an array whose elements have one byte
constexpr int kMaxArrays = 8;

#if defined(__GNUC__)
#define STREAM_INLINE inline __attribute__((always_inline))
typedef uint64_t Vector __attribute__((vector_size(16), aligned(8)));
#else
#define STREAM_INLINE inline
struct Vector {
  uint64_t low, high;
  Vector operator+(Vector other) const { return {low + other.low, high + other.high}; }
};
#endif

// One or two cache lines, in vectors that the processor has registers for: the sums stay in four of them.
template <class V> struct Lines {
  V v[4];
  STREAM_INLINE void add(const Lines& x) {
    for (int k = 0; k < 4; ++k) v[k] = v[k] + x.v[k];
  }
};
template <class V> STREAM_INLINE Lines<V> halves_swapped(const Lines<V>& x) {
  return {{x.v[2], x.v[3], x.v[0], x.v[1]}};
}

template <class V> STREAM_INLINE void run(uint64_t* const* arrays, const int64_t* widths, int n, int written,
                                          int64_t first, int64_t last) {
  struct Cursor {
    Lines<V>* at;
    int64_t count;  // of Lines in a block
  } cursors[kMaxArrays];
  for (int a = 0; a < n; ++a) {
    const int64_t count = widths[a] * kBlock / int64_t(sizeof(Lines<V>));
    cursors[a] = {reinterpret_cast<Lines<V>*>(arrays[a]) + first * count, count};
  }
  for (int64_t b = first; b < last; ++b) {
    Lines<V> sum = {};
    for (int a = 0; a < n; ++a)
      for (int64_t i = 0; i < cursors[a].count; ++i) sum.add(cursors[a].at[i]);
    if constexpr (sizeof(Lines<V>) == 128) sum.add(halves_swapped(sum));
    for (int a = 0; a < n; ++a) {
      Lines<V>* const x = cursors[a].at;
      for (int64_t i = 0; a < written && i < cursors[a].count; ++i) x[i].add(sum);
      cursors[a].at += cursors[a].count;
    }
  }
}

using Run = void (*)(uint64_t* const*, const int64_t*, int, int, int64_t, int64_t);
void run_generic(uint64_t* const* arrays, const int64_t* widths, int n, int written, int64_t first,
                 int64_t last) {
  run<Vector>(arrays, widths, n, written, first, last);
}
#if defined(__x86_64__) && defined(__GNUC__)
typedef uint64_t Vector256 __attribute__((vector_size(32), aligned(8)));
__attribute__((target("avx2"))) void run_avx2(uint64_t* const* arrays, const int64_t* widths, int n,
                                              int written, int64_t first, int64_t last) {
  run<Vector256>(arrays, widths, n, written, first, last);
}
Run fastest() { return __builtin_cpu_supports("avx2") ? run_avx2 : run_generic; }
#else
Run fastest() { return run_generic; }
#endif

}  // namespace

#if defined(_WIN32)
#define STREAM_EXPORT extern "C" __declspec(dllexport)
#else
#define STREAM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Reads n arrays of `blocks` * kBlock elements once, block by block, side by side, and writes the first
// `written` of them where they were read: each line of 64 bytes of a block gains the sum of all lines of that
// block in all arrays. An element of array a has widths[a] bytes.
STREAM_EXPORT void stream_cpu(uint64_t* const* arrays, const int64_t* widths, int n, int written,
                              int64_t blocks) {
  const Run run = fastest();
#ifdef _OPENMP
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    run(arrays, widths, n, written, blocks * t / threads, blocks * (t + 1) / threads);
  }
#else
  run(arrays, widths, n, written, 0, blocks);
#endif
}
