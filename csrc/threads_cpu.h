// How the CPU backend shares its work among threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>

#include <cfenv>
#include <thread>
#endif

namespace fused_adamw {

// A parallel region costs as much as about this many elements cost one thread.
constexpr int64_t kSerial = 16384;

// Whether this process was forked. The threads of OpenMP do not survive a fork, and the thread that they
// worked for would wait for them for ever. A region from a new thread gets new ones: 50 to 100 us on 2 CPUs.
inline bool forked = false;
constexpr int64_t kSerialInFork = 1 << 20;

// Whether there are threads, and `elements` are enough to pay for them.
inline bool are_shared(int64_t elements) {
#ifdef _OPENMP
  return elements > (forked ? kSerialInFork : kSerial) && !omp_in_parallel() && omp_get_max_threads() > 1;
#else
  return false;
#endif
}

// Calls run(first, last) for consecutive parts of [0, n): one for each thread, or a single one where
// `elements` are not shared.
template <class Run> void for_each_part(int64_t n, int64_t elements, const Run& run) {
#ifdef _OPENMP
  if (are_shared(elements)) {
    const int wanted = omp_get_max_threads();
    std::fenv_t callers;
    std::fegetenv(&callers);
    const auto region = [&] {
#pragma omp parallel num_threads(wanted)
      {
        // torch.set_flush_denormal() sets the thread that calls it alone. All threads compute as the caller
        // does, so that the bits do not depend on their number.
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&callers);
        const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
        run(n * t / threads, n * (t + 1) / threads);
        std::fesetenv(&own);
      }
    };
    if (forked) {
      std::thread(region).join();
    } else {
      region();
    }
    return;
  }
#endif
  run(0, n);
}

}  // namespace fused_adamw
