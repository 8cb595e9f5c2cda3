// The ceiling of a step on the CPU: its memory traffic, in one parallel region like the step's own.
#include "stream.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fused_adamw {
namespace {

constexpr int kWords = 8;  // of a cache line

void run(const Array* arrays, int n, int written, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    uint64_t sum[kWords] = {};
    for (int a = 0; a < n; ++a) {
      const uint64_t* x = arrays[a].data + b * arrays[a].width * kWords;
      for (int64_t line = 0; line < arrays[a].width; ++line, x += kWords)
        for (int k = 0; k < kWords; ++k) sum[k] += x[k];
    }
    for (int a = 0; a < written; ++a) {
      uint64_t* x = arrays[a].data + b * arrays[a].width * kWords;
      for (int64_t line = 0; line < arrays[a].width; ++line, x += kWords)
        for (int k = 0; k < kWords; ++k) x[k] += sum[k];
    }
  }
}

}  // namespace

void stream_cpu(const Array* arrays, int n, int written, int64_t blocks) {
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
