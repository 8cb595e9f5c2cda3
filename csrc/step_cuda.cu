// The CUDA backend: one kernel runs over all chunks and applies the rule to every element. It includes no
// header of torch, so nvcc compiles it in seconds; it needs -fmad=false. The kernels and the choice among
// them stay in one file, because the choice is what instantiates the templates.
#include <cuda_runtime_api.h>

#include <type_traits>

#include "scalars.h"
#include "step.h"

namespace fused_adamw {
namespace {

// At least 8 blocks on a multiprocessor have 64 KiB of fp32 Adam's loads in flight. That is 1.5 times what 8
// TB/s at a latency of 0.8 us asks of each of 148 multiprocessors. Without this bound ptxas settles on 40
// registers in some kernels, and spills.
constexpr int kThreads = 128;
constexpr int kBlocks = 8;
// int8 or stochastic rounding needs more registers: 6 blocks. Both, or stochastic amsgrad: 5. Both with a
// master: 4. SGD without momentum needs fewer: 9, and has fewer loads in flight.
constexpr int blocks_of(bool codes, bool words, int states, bool master) {
  if (!codes && !words) return states ? kBlocks : 9;
  return codes + words + (states == 3) == 1 ? 6 : codes && words && master ? 4 : 5;
}

// kWidth neighbouring elements of a stream, which one access moves.
template <class T, int kWidth> struct alignas(sizeof(T) * kWidth) Vector {
  T x[kWidth];
};

template <class T, int kWidth> __device__ __forceinline__ Vector<T, kWidth>& at(T* base, int i) {
  return *reinterpret_cast<Vector<T, kWidth>*>(base + i);
}

// Returns the address of element `base` of the stream whose address is in a column of a row.
template <class T> __device__ __forceinline__ T* stream(const int64_t* row, int column, int64_t base) {
  T* pointer = reinterpret_cast<T*>(row[column]) + base;
  __builtin_assume(__isGlobal(pointer));  // else an address that was read from memory is generic
  return pointer;
}

// The type of a master's extra stream; the parameter's own type where there is no master.
template <Master kMaster, class P> struct ExtraOf {
  using type = typename Mastered<kMaster>::template Extra<P>;
};
template <class P> struct ExtraOf<Master::none, P> {
  using type = P;
};

template <Master kMaster, class P, class E> __device__ __forceinline__ float read_parameter(P p, E extra) {
  if constexpr (kMaster == Master::none)
    return load(p);
  else
    return Mastered<kMaster>::read(p, extra);
}

template <class P, class G, class S, Master kMaster> struct Streams {
  using Extra = typename ExtraOf<kMaster, P>::type;
  P* p;
  G* g;
  S *s0, *s1, *s2;
  Extra* extra;
  float *scales0, *scales1;
  char* ema;      // averages, of float or BFloat16
  float weight;   // of new parameters in their averages
  bool averages;  // whether there are any
  bool narrow;    // whether they are of BFloat16
  // What their random words are drawn by: a Random for each tile, because one that lives through all of them
  // takes twice the registers.
  const int64_t* row;
  int64_t base;
  float step;
};

// The elements that a thread steps at a time. Where kWhole, they are neighbours and one access moves them;
// else they are every 32nd element, up to the end. Either way a warp has 32 * kWidth consecutive elements.
template <bool kWhole, int kWidth> struct Tile {
  int i, end;

  static __device__ __forceinline__ int first() {
    const int thread = int(threadIdx.x);
    return kWhole ? thread * kWidth : thread / 32 * (32 * kWidth) + thread % 32;
  }
  __device__ __forceinline__ int element(int k) const { return kWhole ? i + k : i + 32 * k; }
  __device__ __forceinline__ bool has(int k) const { return kWhole || element(k) < end; }
  // All threads of a warp go on while one has an element, because they find the scale of a block together.
  __device__ __forceinline__ bool any() const {
    return kWhole || kWidth == 1 ? i < end : i - int(threadIdx.x) % 32 < end;
  }

  template <class T> __device__ __forceinline__ Vector<T, kWidth> load(T* base) const {
    if constexpr (kWhole) return at<T, kWidth>(base, i);
    Vector<T, kWidth> to{};
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (has(k)) to.x[k] = base[element(k)];
    return to;
  }
  template <class T> __device__ __forceinline__ void store(T* base, const Vector<T, kWidth>& from) const {
    if constexpr (kWhole) {
      at<T, kWidth>(base, i) = from;
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (has(k)) base[element(k)] = from.x[k];
    }
  }
};

// The random words of a chunk's elements.
struct Random {
  uint64_t seed;
  uint32_t step, index;
  int64_t first, skip;
  uint32_t run, begin;

  __device__ __forceinline__ Random(const int64_t* row, int64_t base, float count)
      : seed(row[COL_SEED]), step(uint32_t(count)), index(uint32_t(row[COL_INDEX])) {
    const int64_t whole_run = row[COL_RUN];
    skip = row[COL_SKIP];
    first = row[COL_OFFSET] + base + (skip ? base / whole_run * skip : 0);
    // A run that is longer than any chunk ends at most once within this one. Shortening the run keeps that
    // end in its place, so 32 bits are enough.
    const int64_t short_run = min(whole_run, int64_t(1) << 30);
    run = uint32_t(short_run);
    begin = uint32_t(short_run - min(whole_run - base % whole_run, short_run));
  }
  __device__ __forceinline__ int64_t number(int i) const {
    return first + i + (skip ? int64_t((begin + uint32_t(i)) / run) * skip : 0);
  }

  // Each word has the element's own half as the lower.
  template <bool kWhole, int kWidth> __device__ __forceinline__ Vector<uint32_t, kWidth>
  words(const Tile<kWhole, kWidth>& tile, uint64_t of_average = 0) const {
    Vector<uint32_t, kWidth> to{};
    if constexpr (kWhole) {  // the number of its first element is a multiple of kWidth
      const uint64_t i = number(tile.i);
      Words w = philox(seed, i / kDrawing | of_average, step, index);
      if (kWidth < kDrawing && i & 4) w.x[0] = w.x[2], w.x[1] = w.x[3];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) to.x[k] = k % 2 ? exchanged(w.x[k / 2]) : w.x[k / 2];
    } else {
#pragma unroll 1  // unrolled, they take 20 registers more
      for (int k = 0; k < kWidth; ++k) {
        const uint64_t i = number(tile.element(k));
        const Words w = philox(seed, i / kDrawing | of_average, step, index);
        const uint32_t low = i & 2 ? w.x[1] : w.x[0], high = i & 2 ? w.x[3] : w.x[2];
        const uint32_t word = i & 4 ? high : low, own_first = i & 1 ? exchanged(word) : word;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          if (j == k) to.x[j] = own_first;
      }
    }
    return to;
  }
};

using Code = uint8_t;

// The codes of a tile, four to a register: of single bytes the compiler makes twice as many instructions.
template <int kWidth> struct Codes {
  Vector<uint32_t, (kWidth + 3) / 4> words{};

  Codes() = default;
  template <bool kWhole> __device__ __forceinline__ Codes(const Tile<kWhole, kWidth>& tile, Code* from) {
    if constexpr (kWhole) {
      words = *reinterpret_cast<decltype(words)*>(from + tile.i);
    } else {
      const Vector<Code, kWidth> stored = tile.load(from);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) set(k, stored.x[k]);
    }
  }
  // Code k, extended by its sign where it is of a signed type.
  template <class As> __device__ __forceinline__ int32_t get(int k) const {
    const unsigned above = std::is_signed<As>::value ? 8 | k % 4 : 4;  // the sign of the byte, or a byte of 0
    int32_t code;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(code) : "r"(words.x[k / 4]), "r"(above * 0x1110 | k % 4));
    return code;
  }
  __device__ __forceinline__ void set(int k, Code code) { words.x[k / 4] |= uint32_t(code) << k % 4 * 8; }
  template <bool kWhole>
  __device__ __forceinline__ void store(const Tile<kWhole, kWidth>& tile, Code* to) const {
    if constexpr (kWhole) {
      *reinterpret_cast<decltype(words)*>(to + tile.i) = words;
    } else {
      Vector<Code, kWidth> stored;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) stored.x[k] = Code(get<Code>(k));
      tile.store(to, stored);
    }
  }
};

template <class T> constexpr Format kFormat = Format::f32;
template <> constexpr Format kFormat<BFloat16> = Format::bf16;
template <> constexpr Format kFormat<Float16> = Format::f16;
template <> constexpr Format kFormat<Code> = Format::i8;

template <class C, class S, bool kWhole, int kWidth> __device__ __forceinline__ Vector<float, kWidth>
read_moment(const Tile<kWhole, kWidth>& tile, S* from, const float* scales) {
  Vector<float, kWidth> x;
  if constexpr (sizeof(S) == sizeof(Code)) {
    const float unit = C::decoding(scales[unsigned(tile.i) / kQuantBlock]);
    const Codes<kWidth> stored(tile, from);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x.x[k] = C::decode(stored.template get<typename C::Code>(k), unit);
  } else {
    const Vector<S, kWidth> stored = tile.load(from);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x.x[k] = load(stored.x[k]);
  }
  return x;
}

// Returns the largest of 32 lanes, or of the half of them that a lane is in.
template <int kLanes> __device__ __forceinline__ uint32_t largest(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kLanes == 32) return __reduce_max_sync(0xffffffffu, bits);
#endif
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
  return bits;
}

// Rounds stochastically, by `words`, where kStochastic; else to nearest.
template <class C, bool kStochastic, class S, bool kWhole, int kWidth>
__device__ __forceinline__ void write_moment(const Tile<kWhole, kWidth>& tile, S* to, float* scales,
                                             const Vector<float, kWidth>& x,
                                             const Vector<uint32_t, kWidth>& words) {
  if constexpr (sizeof(S) == sizeof(Code)) {
    uint32_t most = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (tile.has(k)) most = max(most, magnitude_bits(x.x[k]));
    constexpr int kLanes = kQuantBlock / kWidth;
    const float scale = scale_of(largest<kLanes>(most));
    if (threadIdx.x % kLanes == 0) scales[unsigned(tile.i) / kQuantBlock] = scale;
    const float factor = C::encoding(scale);
    Codes<kWidth> stored;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      stored.set(k, C::template encode<kStochastic>(x.x[k], factor, for_moment(words.x[k], C::kFactor)));
    stored.store(tile, to);
  } else {
    Vector<S, kWidth> stored;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if constexpr (kStochastic)
        store_stochastic(x.x[k], stored.x[k], for_moment(words.x[k], C::kFactor));
      else
        store(x.x[k], stored.x[k]);
    }
    tile.store(to, stored);
  }
}

// Moves the averages of a tile towards new parameters. They are read last, when the registers of the moments
// are free: every kernel can step averages, and none is to need more registers for it.
template <bool kWhole, int kWidth> __device__ __forceinline__ void
average(const Tile<kWhole, kWidth>& tile, float* ema, const Vector<float, kWidth>& p, float weight) {
  static_assert(kWidth <= 4, "addresses are aligned to 16 bytes");
  Vector<float, kWidth> x = tile.load(ema);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) x.x[k] = lerp(x.x[k], p.x[k], weight);
  tile.store(ema, x);
}
template <bool kWhole, int kWidth>
__device__ __forceinline__ void average(const Tile<kWhole, kWidth>& tile, BFloat16* ema,
                                        const Vector<float, kWidth>& p, float weight, const Random& random) {
  Vector<BFloat16, kWidth> x = tile.load(ema);
  const Vector<uint32_t, kWidth> words = random.words(tile, kAverageWords);
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    store_stochastic(lerp(load(x.x[k]), p.x[k], weight), x.x[k], for_parameter(words.x[k]));
  tile.store(ema, x);
}

// Sums of squares of gradients, updates and new parameters.
struct Squares {
  float x[3] = {};

  __device__ __forceinline__ void add(float g, float update, float p) {
    x[0] = fma(g, g, x[0]);
    x[1] = fma(update, update, x[1]);
    x[2] = fma(p, p, x[2]);
  }
  // Writes the sums of all threads of a block, always added in one order, to to[which, block].
  __device__ __forceinline__ void write(double* __restrict__ to) const {
    constexpr int kWarps = kThreads / 32;
    __shared__ double of_warps[3][kWarps];
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      double sum = x[which];
      for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (threadIdx.x % 32 == 0) of_warps[which][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[threadIdx.x][warp];
    to[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = sum;
  }
};

template <class R, class P, class S, Master kMaster> constexpr unsigned kRandomStreams = random_streams(
    kFormat<P>, kMaster, R::kStates > 0 && R::kSecondMoment != 0, R::kSecondMoment >= 0, kFormat<S>);

template <class R, bool kStochastic, bool kMeasured, bool kWhole, int kWidth, class P, class G, class S,
          Master kMaster>
__device__ __forceinline__ void step_span(const typename R::template Scalars<float>& s,
                                          const Streams<P, G, S, kMaster>& to, const Random& random,
                                          int begin, int end, Squares& squares) {
  constexpr unsigned kRandom = kStochastic ? kRandomStreams<R, P, S, kMaster> : 0;
  constexpr bool kAverages = kWidth <= 4;
  using ThreadTile = Tile<kWhole, kWidth>;
  constexpr bool kNoFirst = R::kSecondMoment == 0;
  using Moment0 = std::conditional_t<kNoFirst, SecondMoment, FirstMoment>;
  constexpr bool kRandom0 = kRandom & (kNoFirst ? RANDOM_SECOND_MOMENT : RANDOM_FIRST_MOMENT);
  for (ThreadTile tile{begin + ThreadTile::first(), end}; tile.any(); tile.i += kThreads * kWidth) {
    Vector<P, kWidth> p = tile.load(to.p);
    const Vector<G, kWidth> g = tile.load(to.g);
    Vector<typename ExtraOf<kMaster, P>::type, kWidth> extra;
    if constexpr (kMaster != Master::none) extra = tile.load(to.extra);
    Vector<float, kWidth> x0{}, x1{}, x2{};
    if constexpr (R::kStates > 0) x0 = read_moment<Moment0>(tile, to.s0, to.scales0);
    if constexpr (R::kStates > 1) x1 = read_moment<SecondMoment>(tile, to.s1, to.scales1);
    if constexpr (R::kStates > 2) x2 = read_moment<SecondMoment>(tile, to.s2, to.scales1);
    Vector<float, kWidth> stepped;  // before it is rounded
    Vector<uint32_t, kWidth> words;
    if constexpr (kRandom != 0) words = random.words(tile);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float before = read_parameter<kMaster>(p.x[k], extra.x[k]), gradient = load(g.x[k]);
      const float x = R::update(s, before, gradient, x0.x[k], x1.x[k], x2.x[k]);
      if (kMeasured && tile.has(k)) squares.add(s.grad_factor * gradient, x - before, x);
      stepped.x[k] = x;
      if constexpr (kMaster != Master::none)
        Mastered<kMaster>::write(x, p.x[k], extra.x[k]);
      else if constexpr (kRandom & RANDOM_PARAM)
        store_stochastic(x, p.x[k], for_parameter(words.x[k]));
      else
        store(x, p.x[k]);
    }
    tile.store(to.p, p);
    if constexpr (kMaster != Master::none) tile.store(to.extra, extra);
    if constexpr (R::kStates > 0) write_moment<Moment0, kRandom0>(tile, to.s0, to.scales0, x0, words);
    if constexpr (R::kStates > 1)
      write_moment<SecondMoment, (kRandom & RANDOM_SECOND_MOMENT) != 0>(tile, to.s1, to.scales1, x1, words);
    if constexpr (R::kStates > 2) write_moment<SecondMoment, false>(tile, to.s2, to.scales1, x2, words);
    if constexpr (kAverages)
      if (to.averages) {
        if (to.narrow)
          average(tile, reinterpret_cast<BFloat16*>(to.ema), stepped, to.weight,
                  kRandom != 0 ? random : Random(to.row, to.base, to.step));
        else
          average(tile, reinterpret_cast<float*>(to.ema), stepped, to.weight);
      }
  }
}

// The chunk that a block steps. Its first element is counted with 64 bits, the elements within it with 32.
struct Chunk {
  const int64_t* row;
  int64_t base;
  int n;
  bool aligned, narrow;  // every stream, to 16 bytes; the average, to bf16

  __device__ __forceinline__ Chunk(const int64_t* rows, const int32_t* chunks, int chunk) {
    const int32_t* entry = chunks + int64_t(blockIdx.x) * 2;
    row = rows + int64_t(entry[0]) * COLUMNS;
    base = int64_t(entry[1]) * chunk;
    n = int(max(min(row[COL_NUMEL] - base, int64_t(chunk)), int64_t(0)));
    const int64_t flags = row[COL_FLAGS];
    aligned = flags & ALIGNED;
    narrow = flags & EMA_BF16;
  }
  // How many of its elements can be accessed kWidth at a time.
  template <int kWidth> __device__ __forceinline__ int whole() const {
    return aligned ? n / kWidth * kWidth : 0;
  }
};

// Returns row k of those that are given, or of those on the device.
__device__ __forceinline__ ScalarRow scalar_row(const float* scalars, const GivenScalars& given, int64_t k) {
  if (!given.any) return reinterpret_cast<const ScalarRow*>(scalars)[k];
  return k == 0 ? given.rows[0] : given.rows[1];
}

template <class R, class P, class G, class S, Master kMaster, bool kStochastic, bool kMeasured>
__global__ void __launch_bounds__(kThreads, blocks_of(sizeof(S) == sizeof(Code), kStochastic, R::kStates,
                                                      kMaster != Master::none))
    step_kernel(const int64_t* __restrict__ rows, const int32_t* __restrict__ chunks,
                const float* __restrict__ scalars, const float* __restrict__ factor, int chunk,
                double* __restrict__ sums, const GivenScalars given) {
  const float f = *factor;
  const Chunk c(rows, chunks, chunk);
  const int64_t k = c.row[COL_SCALARS];
  using To = Streams<P, G, S, kMaster>;
  To to{stream<P>(c.row, COL_PARAM, c.base),
        stream<G>(c.row, COL_GRAD, c.base),
        stream<S>(c.row, COL_STATE, c.base),
        stream<S>(c.row, COL_STATE + 1, c.base),
        stream<S>(c.row, COL_STATE + 2, c.base),
        stream<typename To::Extra>(c.row, COL_EXTRA, c.base),
        stream<float>(c.row, COL_SCALES, c.base / kQuantBlock),
        stream<float>(c.row, COL_SCALES + 1, c.base / kQuantBlock),
        stream<char>(c.row, COL_EMA, c.base * (c.narrow ? sizeof(BFloat16) : sizeof(float))),
        0,
        c.row[COL_EMA] != 0,
        c.narrow,
        c.row,
        c.base,
        0};
  // Behind the loads of the addresses, which else would wait for its branch.
  const ScalarRow numbers = scalar_row(scalars, given, k);
  to.weight = numbers.x[SCALAR_EMA];
  to.step = numbers.x[SCALAR_STEP];
  auto s = reinterpret_cast<const typename R::template Scalars<float>&>(numbers);
  s.grad_factor *= f;
  const Random random(c.row, c.base, numbers.x[SCALAR_STEP]);
  constexpr bool kCodes = sizeof(S) == sizeof(Code);
  // A thread accesses 16 bytes of the widest stream at once: 8 elements of 4 bytes would take two accesses at
  // a stride of 32 bytes. With amsgrad or a master, 8 elements spill.
  constexpr bool kNarrow = sizeof(P) == 2 && sizeof(G) == 2 && sizeof(S) <= 2;
  constexpr int kWidth = kNarrow && R::kStates < 3 && kMaster == Master::none ? 8 : 4;
  const bool skipped = f < 0;
  const int n = skipped ? 0 : c.n, whole = skipped ? 0 : c.whole<kCodes ? 32 * kWidth : kWidth>();
  Squares squares;
  // With averages, which are fp32, 8 elements spill.
  if (kWidth > 4 && to.averages)
    step_span<R, kStochastic, kMeasured, true, 4>(s, to, random, 0, whole, squares);
  else
    step_span<R, kStochastic, kMeasured, true, kWidth>(s, to, random, 0, whole, squares);
  step_span<R, kStochastic, kMeasured, false, kCodes ? 4 : 1>(s, to, random, whole, n, squares);
  if (kMeasured && !skipped) squares.write(sums);
}

// Adds the squares of scaled elements, those of a tile in float and the tiles in double: GPUs for graphics
// multiply doubles so slowly that a square in double would take longer than to read the element.
template <bool kWhole, int kWidth, class G>
__device__ __forceinline__ double square_span(G* g, int begin, int end, float scale) {
  using ThreadTile = Tile<kWhole, kWidth>;
  double sum = 0;
  for (ThreadTile tile{begin + ThreadTile::first(), end}; tile.any(); tile.i += kThreads * kWidth) {
    const Vector<G, kWidth> x = tile.load(g);
    float part = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float y = scale * load(x.x[k]);
      part = fma(y, y, part);
    }
    sum += part;
  }
  return sum;
}

// Returns the sum of the squares of a chunk's scaled gradients to all threads, always added in one order.
template <class G> __device__ __forceinline__ double sum_squares(const Chunk& c, G* g, float scale) {
  __shared__ double parts[kThreads];
  constexpr int kWidth = 16 / sizeof(G);
  const int whole = c.whole<kWidth>();
  parts[threadIdx.x] =
      square_span<true, kWidth>(g, 0, whole, scale) + square_span<false, 4>(g, whole, c.n, scale);
  for (unsigned width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) parts[threadIdx.x] += parts[threadIdx.x + width];
  }
  __syncthreads();
  return parts[0];
}

// Where the sum of squares of a chunk of up to 2^16 elements is at least this, what float lost below its
// range is less than a rounding. Less than it times kScaleUp, and anything finite times kScaleDown, has a
// square in the range.
constexpr double kLeastSum = 0x1p-80;
constexpr float kScaleUp = 0x1p100f, kScaleDown = 0x1p-70f;

template <class G> __global__ void __launch_bounds__(kThreads)
    square_kernel(const int64_t* __restrict__ rows, const int32_t* __restrict__ chunks,
                  double* __restrict__ sums, int chunk) {
  const Chunk c(rows, chunks, chunk);
  G* const g = stream<G>(c.row, COL_GRAD, c.base);
  double sum = sum_squares(c, g, 1);
  // Some square left the range of float: again, scaled into it. A chunk of zeros is read twice, too.
  if (sum < kLeastSum || sum == INFINITY) {
    const bool small = sum < kLeastSum;
    const double unscale = small ? 1 / double(kScaleUp) : 1 / double(kScaleDown);
    __syncthreads();  // all have read the sum
    sum = sum_squares(c, g, small ? kScaleUp : kScaleDown) * unscale * unscale;
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// x^n for n >= 0, with the bits of `power` in triton_kernels/multi_tensor.py.
struct Power {
  FUSED_HD double operator()(double x, double count) const {
    double y = 1;
    for (int n = int(count); n > 0; n >>= 1, x *= x)
      if (n & 1) y *= x;
    return y;
  }
};

// A thread advances the counter at an address in `steps` and computes its row of scalars.
template <bool kAdam>
__global__ void scalars_kernel(const double* __restrict__ hyper, const int64_t* __restrict__ rates,
                               const int64_t* __restrict__ steps, const float* __restrict__ factor,
                               float* __restrict__ scalars, int64_t n) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  float* counter = stream<float>(steps + row, 0, 0);
  if (*factor < 0 || !counter) return;
  const float count = *counter + 1;
  *counter = count;
  const int64_t rate = rates[row];
  double lr = hyper[row * HYPERS + HYPER_LR];
  if (rate > 0) lr *= *reinterpret_cast<const double*>(rate);
  if (rate < 0) lr *= *reinterpret_cast<const float*>(~rate);
  scalars_of<kAdam>(hyper + row * HYPERS, lr, count, Power(), scalars + row * SCALARS);
}

using StepKernel = void (*)(const int64_t*, const int32_t*, const float*, const float*, int, double*,
                            GivenScalars);

// Kernels that measure are their own, so that no other needs registers for it, and are compiled for gradients
// of the parameter's type.
template <class R, class P, class G, class S, Master kMaster, bool kStochastic>
StepKernel kernel_of(const Variant& v) {
  if (!v.measured) return step_kernel<R, P, G, S, kMaster, kStochastic, false>;
  if constexpr (std::is_same<G, P>::value) return step_kernel<R, P, G, S, kMaster, kStochastic, true>;
  return nullptr;
}

template <class R, class P, class G, class S, Master kMaster> StepKernel kernel_of(const Variant& v) {
  if constexpr (kRandomStreams<R, P, S, kMaster> != 0)
    if (v.stochastic) return kernel_of<R, P, G, S, kMaster, true>(v);
  return kernel_of<R, P, G, S, kMaster, false>(v);  // stochastic rounding applies to none of its streams
}

template <class R, class P, class G, Master kMaster> StepKernel kernel_of(const Variant& v) {
  if constexpr (R::kStates == 0) {
    return kernel_of<R, P, G, P, kMaster>(v);
  } else {
    if (v.state == Format::f32) return kernel_of<R, P, G, float, kMaster>(v);
    if (v.state == Format::bf16) return kernel_of<R, P, G, BFloat16, kMaster>(v);
    if constexpr (R::kStates < 3)
      if (v.state == Format::i8) return kernel_of<R, P, G, Code, kMaster>(v);
    return nullptr;
  }
}

// Rules that few use are compiled for fewer formats.
template <class R> constexpr bool kFew = false;
template <> constexpr bool kFew<Adam<Rule::adam_cautious_decay>> = true;
template <> constexpr bool kFew<Adam<Rule::adam_cautious_update>> = true;
template <> constexpr bool kFew<Adam<Rule::adabound>> = true;
template <> constexpr bool kFew<Adam<Rule::amsbound>> = true;
template <> constexpr bool kFew<Adam<Rule::adam_no_first_moment>> = true;

template <class R, class P, class G> StepKernel kernel_of(const Variant& v) {
  const bool plain = v.master == Master::none && !v.stochastic && v.state != Format::i8;
  if constexpr (!kFew<R>) {
    if (plain) {
      if constexpr (R::kStates == 0) return kernel_of<R, P, G, P, Master::none, false>(v);
      switch (v.state) {
      case Format::f32: return kernel_of<R, P, G, float, Master::none, false>(v);
      case Format::bf16: return kernel_of<R, P, G, BFloat16, Master::none, false>(v);
      default: return kernel_of<R, P, G, Float16, Master::none, false>(v);
      }
    }
  }
  // The other formats are compiled for gradients of float32 or of the parameter's type, and for moments of
  // float32, bfloat16 or int8. That is half as many kernels again; every mix would be four times as many.
  // Few are compiled for gradients of the parameter's type alone, and these moments.
  if constexpr (std::is_same<G, P>::value || (std::is_same<G, float>::value && !kFew<R>)) {
    if (v.master == Master::none) return kernel_of<R, P, G, Master::none>(v);
    if constexpr (sizeof(P) == 2)
      if (v.master == Master::fp32) return kernel_of<R, P, G, Master::fp32>(v);
    if constexpr (std::is_same<P, BFloat16>::value) {
      if (v.master == Master::kahan) return kernel_of<R, P, G, Master::kahan>(v);
      if (v.master == Master::split16) return kernel_of<R, P, G, Master::split16>(v);
    }
  }
  return nullptr;
}

template <class R, class P> StepKernel kernel_of(const Variant& v) {
  switch (v.g) {
  case Format::f32: return kernel_of<R, P, float>(v);
  case Format::bf16: return kernel_of<R, P, BFloat16>(v);
  default: return kernel_of<R, P, Float16>(v);
  }
}

template <class R> StepKernel kernel_of(const Variant& v) {
  switch (v.p) {
  case Format::f32: return kernel_of<R, float>(v);
  case Format::bf16: return kernel_of<R, BFloat16>(v);
  default: return kernel_of<R, Float16>(v);
  }
}

// Returns the compiled kernel of a variant, or nullptr.
StepKernel kernel_of(const Variant& v) {
  switch (v.rule) {
  case Rule::adam: return kernel_of<Adam<Rule::adam>>(v);
  case Rule::adam_amsgrad: return kernel_of<Adam<Rule::adam_amsgrad>>(v);
  case Rule::sgd: return kernel_of<Sgd<false>>(v);
  case Rule::sgd_momentum: return kernel_of<Sgd<true>>(v);
  case Rule::adam_cautious_decay: return kernel_of<Adam<Rule::adam_cautious_decay>>(v);
  case Rule::adam_cautious_update: return kernel_of<Adam<Rule::adam_cautious_update>>(v);
  case Rule::adabound: return kernel_of<Adam<Rule::adabound>>(v);
  case Rule::amsbound: return kernel_of<Adam<Rule::amsbound>>(v);
  default: return kernel_of<Adam<Rule::adam_no_first_moment>>(v);
  }
}

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* step_cuda(const Variant& variant, const Tables& t, const float* scalars, const float* factor,
                      double* sums, const GivenScalars& given, void* stream) {
  if (t.count == 0) return nullptr;
  kernel_of(variant)<<<unsigned(t.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      t.rows, t.chunks, scalars, factor, t.chunk, sums, given);
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

const char* scalars_cuda(const Variant& variant, const double* hyper, const int64_t* rates,
                         const int64_t* steps, int64_t n, const float* factor, float* scalars, void* stream) {
  const auto kernel = is_adam(variant.rule) ? scalars_kernel<true> : scalars_kernel<false>;
  kernel<<<unsigned((n + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      hyper, rates, steps, factor, scalars, n);
  return text_of(cudaGetLastError());
}

bool has_cuda(const Variant& variant) { return kernel_of(variant) != nullptr; }

const char* check_cuda(const Variant& variant) {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel_of(variant)));
  cudaGetLastError();  // clears the error, which the next caller would take for its own
  return text_of(error);
}

}  // namespace fused_adamw
