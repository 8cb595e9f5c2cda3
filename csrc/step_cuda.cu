// The CUDA backend: one kernel over chunks, the rule per element. Compiled by nvcc alone in seconds, since no
// header of torch is seen here; -fmad=false.
#include <cuda_runtime_api.h>

#include "step.h"

namespace fused_adamw {
namespace {

constexpr int kColumns = 8;  // of a row
// At least 8 blocks on a multiprocessor: 64 KiB of fp32 Adam's loads in flight, 1.5 times what 8 TB/s at a
// latency of 0.8 us asks of each of 148. Left to itself ptxas takes 40 registers here and there, and spills.
constexpr int kThreads = 128;
constexpr int kBlocks = 8;

// kWidth neighbouring elements of a stream, in one access.
template <class T, int kWidth> struct alignas(sizeof(T) * kWidth) Vector {
  T x[kWidth];
};

template <class T, int kWidth> __device__ __forceinline__ Vector<T, kWidth>& at(T* base, int i) {
  return *reinterpret_cast<Vector<T, kWidth>*>(base + i);
}

// Element `base` of the stream whose address is in a column of a row.
template <class T> __device__ __forceinline__ T* stream(const int64_t* row, int column, int64_t base) {
  T* pointer = reinterpret_cast<T*>(row[column]) + base;
  __builtin_assume(__isGlobal(pointer));  // an address read from memory is generic otherwise
  return pointer;
}

template <class P, class G, class S> struct Streams {
  P* p;
  G* g;
  S *s0, *s1, *s2;
};

template <class R, int kWidth, class P, class G, class S> __device__ __forceinline__ void
step_span(const typename R::template Scalars<float>& s, const Streams<P, G, S>& to, int begin, int end) {
  for (int i = begin + int(threadIdx.x) * kWidth; i < end; i += kThreads * kWidth) {
    Vector<P, kWidth> p = at<P, kWidth>(to.p, i);
    const Vector<G, kWidth> g = at<G, kWidth>(to.g, i);
    Vector<S, kWidth> s0, s1, s2;
    if constexpr (R::kStates > 0) s0 = at<S, kWidth>(to.s0, i);
    if constexpr (R::kStates > 1) s1 = at<S, kWidth>(to.s1, i);
    if constexpr (R::kStates > 2) s2 = at<S, kWidth>(to.s2, i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float x0 = 0, x1 = 0, x2 = 0;
      if constexpr (R::kStates > 0) x0 = load(s0.x[k]);
      if constexpr (R::kStates > 1) x1 = load(s1.x[k]);
      if constexpr (R::kStates > 2) x2 = load(s2.x[k]);
      store(R::update(s, load(p.x[k]), load(g.x[k]), x0, x1, x2), p.x[k]);
      if constexpr (R::kStates > 0) store(x0, s0.x[k]);
      if constexpr (R::kStates > 1) store(x1, s1.x[k]);
      if constexpr (R::kStates > 2) store(x2, s2.x[k]);
    }
    at<P, kWidth>(to.p, i) = p;
    if constexpr (R::kStates > 0) at<S, kWidth>(to.s0, i) = s0;
    if constexpr (R::kStates > 1) at<S, kWidth>(to.s1, i) = s1;
    if constexpr (R::kStates > 2) at<S, kWidth>(to.s2, i) = s2;
  }
}

// The chunk of a block. Elements are counted with 64 bits up to the chunk, with 32 within it.
struct Chunk {
  const int64_t* row;
  int64_t base;
  int n;

  __device__ __forceinline__ Chunk(const int64_t* rows, const int32_t* chunks, int chunk) {
    const int32_t* entry = chunks + int64_t(blockIdx.x) * 2;
    row = rows + int64_t(entry[0]) * kColumns;
    base = int64_t(entry[1]) * chunk;
    n = int(min(row[5] - base, int64_t(chunk)));
  }
  // How many of its elements can be accessed by kWidth.
  template <int kWidth> __device__ __forceinline__ int whole() const {
    return row[7] & 1 ? n / kWidth * kWidth : 0;
  }
};

template <class R, class P, class G, class S> __global__ void __launch_bounds__(kThreads, kBlocks)
    step_kernel(const int64_t* __restrict__ rows, const int32_t* __restrict__ chunks,
                const float* __restrict__ scalars, const float* __restrict__ factor, int chunk) {
  if (*factor < 0) return;
  const Chunk c(rows, chunks, chunk);
  using Scalars = typename R::template Scalars<float>;
  Scalars s = *reinterpret_cast<const Scalars*>(scalars + c.row[6] * kScalars);
  s.grad_factor *= *factor;
  const Streams<P, G, S> to{stream<P>(c.row, 0, c.base), stream<G>(c.row, 1, c.base),
                            stream<S>(c.row, 2, c.base), stream<S>(c.row, 3, c.base),
                            stream<S>(c.row, 4, c.base)};
  // 16 bytes of the widest stream; 8 elements of 4 bytes would be two accesses at a stride of 32 bytes.
  constexpr int kWidth = sizeof(P) == 2 && sizeof(G) == 2 && sizeof(S) == 2 ? 8 : 4;
  const int whole = c.whole<kWidth>();
  step_span<R, kWidth>(s, to, 0, whole);
  step_span<R, 1>(s, to, whole, c.n);
}

// In double: a square of a float is exact, and neither overflows nor underflows.
template <int kWidth, class G> __device__ __forceinline__ double square_span(G* g, int begin, int end) {
  double sum = 0;
  for (int i = begin + int(threadIdx.x) * kWidth; i < end; i += kThreads * kWidth) {
    const Vector<G, kWidth> x = at<G, kWidth>(g, i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const double y = load(x.x[k]);
      sum = fma(y, y, sum);
    }
  }
  return sum;
}

template <class G> __global__ void __launch_bounds__(kThreads)
    square_kernel(const int64_t* __restrict__ rows, const int32_t* __restrict__ chunks,
                  double* __restrict__ sums, int chunk) {
  __shared__ double parts[kThreads];
  const Chunk c(rows, chunks, chunk);
  G* const g = stream<G>(c.row, 1, c.base);
  constexpr int kWidth = 16 / sizeof(G);
  const int whole = c.whole<kWidth>();
  parts[threadIdx.x] = square_span<kWidth>(g, 0, whole) + square_span<1>(g, whole, c.n);
  for (unsigned width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) parts[threadIdx.x] += parts[threadIdx.x + width];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
}

// x^n for n >= 0, as triton_kernels/multi_tensor.py has it, to the bit.
__device__ double power(double x, int n) {
  double y = 1;
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) y *= x;
  return y;
}

// fused_adamw/scalars.py in CUDA; fused_adamw/launch.py tells what is in `hyper`.
template <bool kAdam>
__global__ void scalars_kernel(const double* __restrict__ hyper, const int64_t* __restrict__ steps,
                               const float* __restrict__ factor, float* __restrict__ scalars, int64_t n) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  const double* h = hyper + row * kColumns;
  float* to = scalars + row * kScalars;
  float* counter = stream<float>(steps + row, 0, 0);
  if (*factor < 0) return;
  const float count = *counter + 1;
  *counter = count;
  const int step = int(count);
  const double lr = h[0];
  to[0] = float(lr / h[1] * h[2]);
  to[1] = float(h[3]);
  to[2] = float(h[4]);
  if constexpr (kAdam) {
    const double beta1 = h[5], beta2 = h[6];
    to[3] = float(1 - beta1);
    to[4] = float(1 - beta2);
    to[5] = float(lr / (1 - power(beta1, step)));
    to[6] = float(1 / sqrt(1 - power(beta2, step)));
    to[7] = float(h[7]);
  } else {
    const double momentum = h[5], dampening = h[6];
    const int flags = int(h[7]);
    const bool nesterov = flags & 1, lr_in_momentum = flags & 2;
    const double into = lr_in_momentum ? lr : 1;
    const bool direct = momentum == 0 || nesterov;
    to[3] = float(momentum);
    to[4] = float(into * (step > 1 ? 1 - dampening : 1));
    to[5] = float(lr_in_momentum ? 1 : lr);
    to[6] = float(direct ? into : 0);
    to[7] = float(direct ? momentum : 1);
  }
}

using StepKernel = void (*)(const int64_t*, const int32_t*, const float*, const float*, int);

template <class R, class P, class G> StepKernel kernel_of(Format state) {
  if constexpr (R::kStates == 0) {
    return step_kernel<R, P, G, P>;
  } else {
    switch (state) {
    case Format::f32: return step_kernel<R, P, G, float>;
    case Format::bf16: return step_kernel<R, P, G, BFloat16>;
    default: return step_kernel<R, P, G, Float16>;
    }
  }
}

template <class R, class P> StepKernel kernel_of(Format g, Format state) {
  switch (g) {
  case Format::f32: return kernel_of<R, P, float>(state);
  case Format::bf16: return kernel_of<R, P, BFloat16>(state);
  default: return kernel_of<R, P, Float16>(state);
  }
}

template <class R> StepKernel kernel_of(const Variant& v) {
  switch (v.p) {
  case Format::f32: return kernel_of<R, float>(v.g, v.state);
  case Format::bf16: return kernel_of<R, BFloat16>(v.g, v.state);
  default: return kernel_of<R, Float16>(v.g, v.state);
  }
}

StepKernel kernel_of(const Variant& v) {
  switch (v.rule) {
  case Rule::adam: return kernel_of<Adam<false>>(v);
  case Rule::adam_amsgrad: return kernel_of<Adam<true>>(v);
  case Rule::sgd: return kernel_of<Sgd<false>>(v);
  default: return kernel_of<Sgd<true>>(v);
  }
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* step_cuda(const Variant& variant, const Tables& t, const float* scalars, const float* factor,
                      void* stream) {
  if (t.count == 0) return nullptr;
  kernel_of(variant)<<<unsigned(t.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      t.rows, t.chunks, scalars, factor, t.chunk);
  return text_of(cudaGetLastError());
}

const char* sum_squares_cuda(const Variant& variant, const Tables& t, double* sums, void* stream) {
  if (t.count == 0) return nullptr;
  const auto kernel = variant.g == Format::f32    ? square_kernel<float>
                      : variant.g == Format::bf16 ? square_kernel<BFloat16>
                                                  : square_kernel<Float16>;
  kernel<<<unsigned(t.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(t.rows, t.chunks, sums,
                                                                                t.chunk);
  return text_of(cudaGetLastError());
}

const char* scalars_cuda(const Variant& variant, const double* hyper, const int64_t* steps, int64_t n,
                         const float* factor, float* scalars, void* stream) {
  const bool adam = variant.rule == Rule::adam || variant.rule == Rule::adam_amsgrad;
  const auto kernel = adam ? scalars_kernel<true> : scalars_kernel<false>;
  kernel<<<unsigned((n + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      hyper, steps, factor, scalars, n);
  return text_of(cudaGetLastError());
}

const char* check_cuda(const Variant& variant) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel_of(variant)));
  cudaGetLastError();  // not to be found by the next who asks
  return text_of(error);
}

}  // namespace fused_adamw
