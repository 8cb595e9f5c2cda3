// The small kernels between the norm of all gradients and their step, one block each: in one block the order
// of the additions is fixed without atomics. It needs -fmad=false.
#include <cuda_runtime_api.h>

#include "factor.h"

namespace fused_adamw {
namespace {

constexpr int kThreads = 512;

// Returns the sum of sums[begin] to sums[end - 1] to thread 0.
__device__ double total(const double* __restrict__ sums, int64_t begin, int64_t end) {
  __shared__ double parts[kThreads];
  double sum = 0;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += sums[i];
  parts[threadIdx.x] = sum;
  for (unsigned width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) parts[threadIdx.x] += parts[threadIdx.x + width];
  }
  return parts[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads)
    totals_kernel(const double* __restrict__ sums, const int64_t* __restrict__ bounds,
                  const float* __restrict__ found, double* __restrict__ totals, float* __restrict__ flag) {
  const double sum = total(sums, bounds[blockIdx.x], bounds[blockIdx.x + 1]);
  if (threadIdx.x != 0) return;
  totals[blockIdx.x] = sum;
  if (blockIdx.x == 0 && found) *flag = *found != 0 ? 1 : 0;
}

__global__ void __launch_bounds__(kThreads)
    factor_kernel(const double* __restrict__ sums, int64_t n, Clipping clipping, float* __restrict__ factor,
                  float* __restrict__ norm) {
  const double sum = total(sums, 0, n);
  if (threadIdx.x != 0) return;
  double root;
  *factor = float(factor_of(sum, clipping, root));
  if (norm) *norm = float(root);
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* totals_cuda(const double* sums, const int64_t* bounds, int64_t segments, const float* found,
                        double* totals, float* flag, void* stream) {
  totals_kernel<<<unsigned(segments), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sums, bounds, found,
                                                                                        totals, flag);
  return text_of(cudaGetLastError());
}

const char* factor_cuda(const double* sums, int64_t n, const Clipping& clipping, float* factor, float* norm,
                        void* stream) {
  factor_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(sums, n, clipping, factor, norm);
  return text_of(cudaGetLastError());
}

}  // namespace fused_adamw
