// The sum of the squares of all gradients, for clipping by their global norm.
#include <algorithm>
#include <cstring>
#include <vector>

#include "formats_avx2.h"
#include "step.h"
#include "threads_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__GLIBC__)  // ifunc
#define FUSED_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FUSED_CLONES
#endif

namespace fused_adamw {
namespace {

// Independent sums hide the latency of an addition: element i goes to the sum i % kLanes.
constexpr int kLanes = 32;
// Bytes to prefetch ahead. Without that the sum takes 1.13 to 1.2 times as long (AMD EPYC, AVX2, 498 MB).
constexpr size_t kAhead = 2048;

// Adds the squares of kLanes values to as many sums, of which unshuffle() then makes the sum of each lane.
template <class G> FUSED_HD void add_squares(const G* g, double* sums) {
  for (int k = 0; k < kLanes; ++k) {
    const double x = load(g[k]);
    sums[k] += x * x;
  }
}
template <class G> FUSED_HD void unshuffle(double*) {}

// Even and odd values apart: to widen them in their order takes 1.24 (AVX2) and 1.35 (AVX-512) times as long.
template <> FUSED_HD void add_squares(const BFloat16* g, double* sums) {
  for (int k = 0; k < kLanes / 2; ++k) {
    uint32_t pair;
    std::memcpy(&pair, g + 2 * k, sizeof(pair));
    const double low = bit_cast<float>(pair << 16), high = bit_cast<float>(pair & 0xffff0000u);
    sums[k] += low * low;
    sums[k + kLanes / 2] += high * high;
  }
}
template <> FUSED_HD void unshuffle<BFloat16>(double* sums) {
  double apart[kLanes];
  std::copy_n(sums, kLanes, apart);
  for (int k = 0; k < kLanes; ++k) sums[k] = apart[k / 2 + k % 2 * (kLanes / 2)];
}

// In double the square of a float is exact, and neither overflows nor underflows. So contraction changes
// nothing, and the result has the same bits for any instruction set.
template <class G> FUSED_HD double sum_squares(const void* from, int64_t n) {
  const G* g = static_cast<const G*>(from);
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t line = 0; line < kLanes * sizeof(G); line += 64)
      FUSED_PREFETCH(reinterpret_cast<const char*>(g + i) + kAhead + line);
    add_squares(g + i, sums);
  }
  unshuffle<G>(sums);
  for (int k = 0; i + k < n; ++k) {
    const double x = load(g[i + k]);
    sums[k] += x * x;
  }
  for (int width = kLanes / 2; width; width /= 2)
    for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
  return sums[0];
}

FUSED_CLONES double sum_f32(const void* g, int64_t n) { return sum_squares<float>(g, n); }
FUSED_CLONES double sum_f64(const void* g, int64_t n) { return sum_squares<double>(g, n); }
FUSED_CLONES double sum_bf16(const void* g, int64_t n) { return sum_squares<BFloat16>(g, n); }
FUSED_CLONES double sum_f16_generic(const void* g, int64_t n) { return sum_squares<Float16>(g, n); }
// Takes at most kPart elements. The generic loop takes 2.2 times as long in the cache and 1.3 out of it.
double sum_f16(const void* g, int64_t n) {
#ifdef FUSED_X86
  if (cpu_isas()[1]) {
    alignas(64) float x[kPart];
    load_f16c(g, x, n);
    return sum_f32(x, n);
  }
#endif
  return sum_f16_generic(g, n);
}

constexpr double (*kSums[])(const void*, int64_t) = {sum_f32, sum_f64, sum_bf16, sum_f16};  // by Format
constexpr int64_t kItemsize[] = {4, 8, 2, 2};

}  // namespace

double sum_squares_cpu(const Row* rows, int64_t n) {
  struct Part {
    const Row* row;
    int64_t begin;
  };
  std::vector<Part> parts;
  int64_t blocks = 0;  // as in step_cpu(): however small a tensor is, its overhead is that of a block
  for (const Row* row = rows; row != rows + n; ++row) {
    blocks += (row->numel + kQuantBlock - 1) / kQuantBlock;
    for (int64_t begin = 0; begin < row->numel; begin += kPart) parts.push_back({row, begin});
  }
  std::vector<double> sums(parts.size());
  for_each_part(int64_t(parts.size()), blocks * kQuantBlock, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Part& part = parts[i];
      const int format = int(part.row->g_format);
      sums[i] = kSums[format](static_cast<const char*>(part.row->g) + part.begin * kItemsize[format],
                              std::min(kPart, part.row->numel - part.begin));
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace fused_adamw
