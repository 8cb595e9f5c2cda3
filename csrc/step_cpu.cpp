// The CPU backend: one parallel region over all tensors. The loops are compiled once for each instruction
// set, and tables of them are chosen at run time. The tables and the spans that call through them are
// templates over the compute type, which is why they share a file.
#include <algorithm>
#include <vector>

#include "formats_avx512.h"
#include "loops_cpu.h"
#include "step.h"
#include "threads_cpu.h"

#ifdef FUSED_X86
#include <cpuid.h>
#endif

namespace fused_adamw {
namespace {

// Threads are given whole blocks: no two write to one cache line of an aligned tensor, or share a scale.
constexpr int64_t kBlock = kQuantBlock;
constexpr int64_t kRowsAhead = 2;

// ---- The loops, compiled for each instruction set.

#define FUSED_ISA(Name, target_attribute)                                                                    \
  struct Name {                                                                                              \
    static constexpr auto philox = philox_loop;                                                              \
    template <class R, typename T, class Word, bool kRandom, bool kMeasured>                                 \
    target_attribute static void update(const double* s, int64_t n, void* p, const void* g, void* const* x,  \
                                        const DrawnPairs& drawn, double* squares) {                          \
      update_loop<R, T, kRandom, kMeasured>(s, n, static_cast<Word*>(p), static_cast<const Word*>(g),        \
                                            static_cast<Word*>(x[0]), static_cast<Word*>(x[1]),              \
                                            static_cast<Word*>(x[2]), drawn, squares);                       \
    }                                                                                                        \
    template <Master kMaster, class P>                                                                       \
    target_attribute static void read_master(const void* p, const void* extra, float* to, int64_t n) {       \
      read_master_loop<kMaster, P>(p, extra, to, n);                                                         \
    }                                                                                                        \
    template <Master kMaster, class P>                                                                       \
    target_attribute static void write_master(const float* from, void* p, void* extra, int64_t n) {          \
      write_master_loop<kMaster, P>(from, p, extra, n);                                                      \
    }                                                                                                        \
    target_attribute static void store_random(const float* from, void* to, const uint16_t* random,           \
                                              int64_t n) {                                                   \
      store_random_loop(from, to, random, n);                                                                \
    }                                                                                                        \
    target_attribute static void exchange(const DrawnPair* words, DrawnPair* to, int64_t n) {                \
      exchange_loop(words, to, n);                                                                           \
    }                                                                                                        \
    target_attribute static void for_moments(const uint16_t* own, const uint16_t* other, uint16_t factor,    \
                                             uint16_t* to, int64_t n) {                                      \
      for_moments_loop(own, other, factor, to, n);                                                           \
    }                                                                                                        \
    template <class Q>                                                                                       \
    target_attribute static void decode(const void* codes, const float* scales, float* to, int64_t n) {      \
      decode_loop<Q>(codes, scales, to, n);                                                                  \
    }                                                                                                        \
    template <class Q, bool kRandom> target_attribute static void                                            \
    encode(const float* from, void* codes, float* scales, const uint16_t* random, int64_t n) {               \
      encode_loop<Q, kRandom>(from, codes, scales, random, n);                                               \
    }                                                                                                        \
    template <typename T> target_attribute static void average(T* ema, const T* p, T weight, int64_t n) {    \
      average_loop(ema, p, weight, n);                                                                       \
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
FUSED_ISA(Avx2, FUSED_AVX2)
FUSED_ISA(Avx512, FUSED_AVX512)

// The same with loops by intrinsics.
#define FUSED_CODES(Name, target_attribute, Block, philox_function)                                          \
  struct Name##Codes : Name {                                                                                \
    static constexpr auto philox = philox_function;                                                          \
    template <class Q>                                                                                       \
    target_attribute static void decode(const void* codes, const float* scales, float* to, int64_t n) {      \
      decode_blocks<Block, Q>(codes, scales, to, n);                                                         \
    }                                                                                                        \
    template <class Q, bool kRandom> target_attribute static void                                            \
    encode(const float* from, void* codes, float* scales, const uint16_t* random, int64_t n) {               \
      encode_blocks<Block, Q, kRandom>(from, codes, scales, random, n);                                      \
    }                                                                                                        \
  };
FUSED_CODES(Avx2, FUSED_AVX2, BlockAvx2, philox_avx2)
FUSED_CODES(Avx512, FUSED_AVX512, BlockAvx512, philox_avx512)
#endif

// ---- Tables of the loops, one for each instruction set.

using Update = void (*)(const double*, int64_t, void*, const void*, void* const*, const DrawnPairs&, double*);
struct Updates {
  Update plain[kRules], measured[kRules];  // by Rule; the latter add to sums of squares
  Update of(const Row& row) const { return (row.squares ? measured : plain)[int(row.rule)]; }
};
template <typename T> struct Kernels {
  Updates updates;                            // all streams are in the compute type
  void (*load[4])(const void*, T*, int64_t);  // by Format
  void (*store[4])(const T*, void*, int64_t);
  void (*average)(T*, const T*, T, int64_t);
};

// Loops over values of 16 bits or fewer, which are computed in float.
struct NarrowKernels {
  Updates pairs, random_pairs;                                           // all streams are pairs of bf16
  void (*read_master[4][2])(const void*, const void*, float*, int64_t);  // by Master; bf16, f16
  void (*write_master[4][2])(const float*, void*, void*, int64_t);
  void (*store_random)(const float*, void*, const uint16_t*, int64_t);
  void (*decode[2])(const void*, const float*, float*, int64_t);             // first moment, second moment
  void (*encode[4])(const float*, void*, float*, const uint16_t*, int64_t);  // the same two, stochastically
  void (*philox)(uint64_t, uint64_t, uint32_t, uint32_t, uint16_t*, int64_t);
  void (*exchange)(const DrawnPair*, DrawnPair*, int64_t);
  void (*for_moments)(const uint16_t*, const uint16_t*, uint16_t, uint16_t*, int64_t);
};

// tensor_checks.py refuses storage narrower than fp32 for fp64 arithmetic, because it would round twice.
#define FUSED_RULES(Isa, ...)                                                                                \
  {Isa::template update<Adam<Rule::adam>, __VA_ARGS__>,                                                      \
   Isa::template update<Adam<Rule::adam_amsgrad>, __VA_ARGS__>,                                              \
   Isa::template update<Sgd<false>, __VA_ARGS__>,                                                            \
   Isa::template update<Sgd<true>, __VA_ARGS__>,                                                             \
   Isa::template update<Adam<Rule::adam_cautious_decay>, __VA_ARGS__>,                                       \
   Isa::template update<Adam<Rule::adam_cautious_update>, __VA_ARGS__>,                                      \
   Isa::template update<Adam<Rule::adabound>, __VA_ARGS__>,                                                  \
   Isa::template update<Adam<Rule::amsbound>, __VA_ARGS__>,                                                  \
   Isa::template update<Adam<Rule::adam_no_first_moment>, __VA_ARGS__>}
#define FUSED_UPDATES(Isa, ...) {FUSED_RULES(Isa, __VA_ARGS__, false), FUSED_RULES(Isa, __VA_ARGS__, true)}
#define FUSED_MASTERS(function)                                                                              \
  {                                                                                                          \
    {}, {function<Master::kahan, BFloat16>}, {function<Master::split16, BFloat16>}, {                        \
      function<Master::fp32, BFloat16>, function<Master::fp32, Float16>                                      \
    }                                                                                                        \
  }
template <class Isa> constexpr Kernels<float> kernels(float) {
  return {FUSED_UPDATES(Isa, float, float, false),
          {nullptr, Isa::template load<double, float>, Isa::template load<BFloat16, float>,
           Isa::template load<Float16, float>},
          {nullptr, Isa::template store<double, float>, Isa::template store<BFloat16, float>,
           Isa::template store<Float16, float>},
          Isa::template average<float>};
}
template <class Isa> constexpr Kernels<double> kernels(double) {
  return {FUSED_UPDATES(Isa, double, double, false),
          {Isa::template load<float, double>, nullptr, Isa::template load<BFloat16, double>,
           Isa::template load<Float16, double>},
          {Isa::template store<float, double>, nullptr, nullptr, nullptr},
          Isa::template average<double>};
}
template <class Isa> constexpr NarrowKernels narrow_kernels() {
  return {FUSED_UPDATES(Isa, float, Pair, false),
          FUSED_UPDATES(Isa, float, Pair, true),
          FUSED_MASTERS(Isa::template read_master),
          FUSED_MASTERS(Isa::template write_master),
          Isa::store_random,
          {Isa::template decode<FirstMoment>, Isa::template decode<SecondMoment>},
          {Isa::template encode<FirstMoment, false>, Isa::template encode<SecondMoment, false>,
           Isa::template encode<FirstMoment, true>, Isa::template encode<SecondMoment, true>},
          Isa::philox,
          Isa::exchange,
          Isa::for_moments};
}

#ifdef FUSED_X86
template <class Isa> constexpr Kernels<float> kernels_avx2() {
  Kernels<float> k = kernels<Isa>(0.0f);
  k.load[int(Format::f16)] = load_f16c;
  k.store[int(Format::f16)] = store_f16c;
  return k;
}
#endif

struct IsaTable {
  Kernels<float> f32;
  Kernels<double> f64;
  NarrowKernels narrow;
};
constexpr IsaTable kIsas[] = {
    {kernels<Generic>(0.0f), kernels<Generic>(0.0), narrow_kernels<Generic>()},
#ifdef FUSED_X86
    {kernels_avx2<Avx2>(), kernels<Avx2>(0.0), narrow_kernels<Avx2Codes>()},
    {kernels_avx2<Avx512>(), kernels<Avx512>(0.0), narrow_kernels<Avx512Codes>()},
#endif
};

// ---- A span of a row. A stream in the compute type is used in place; others go through tiles.

template <typename T> constexpr Format kNative = sizeof(T) == 4 ? Format::f32 : Format::f64;
constexpr int64_t kItemsize[] = {4, 8, 2, 2, 1};

const Kernels<float>& kernels_of(const IsaTable& isa, float) { return isa.f32; }
const Kernels<double>& kernels_of(const IsaTable& isa, double) { return isa.f64; }

template <typename T> struct Stream {
  const IsaTable* isa;
  char* base;
  Format format;
  T* tile;
  const uint16_t* random = nullptr;  // what it draws where it is rounded stochastically
  bool second_moment = false;
  Master master = Master::none;
  char* extra = nullptr;
  float* scales = nullptr;

  bool native() const { return format == kNative<T>; }
  char* at(int64_t i) const { return base + i * kItemsize[int(format)]; }
  char* extra_at(int64_t i) const { return extra + i * (master == Master::fp32 ? 4 : 2); }

  // Returns elements [i, i + n), in place or in the tile.
  T* read(int64_t i, int64_t n) const {
    if (native()) return reinterpret_cast<T*>(at(i));
    if constexpr (sizeof(T) == 4) {
      if (master != Master::none) {
        isa->narrow.read_master[int(master)][format == Format::f16](at(i), extra_at(i), tile, n);
        return tile;
      }
      if (format == Format::i8) {
        isa->narrow.decode[second_moment](at(i), scales + i / kQuantBlock, tile, n);
        return tile;
      }
    }
    kernels_of(*isa, T()).load[int(format)](at(i), tile, n);
    return tile;
  }

  // Stores elements [i, i + n) from the tile.
  void write(int64_t i, int64_t n) const {
    if (native()) return;
    if constexpr (sizeof(T) == 4) {
      const NarrowKernels& k = isa->narrow;
      if (master != Master::none)
        return k.write_master[int(master)][format == Format::f16](tile, at(i), extra_at(i), n);
      if (format == Format::i8)
        return k.encode[second_moment + 2 * (random != nullptr)](tile, at(i), scales + i / kQuantBlock,
                                                                 random, n);
      if (random) return k.store_random(tile, at(i), random, n);
    }
    kernels_of(*isa, T()).store[int(format)](tile, at(i), n);
  }
};

// The 16 bits that each element of a tile draws for its parameter, first moment and second moment.
struct Drawn {
  static constexpr int64_t kMost = 2 * kTile;  // elements
  using Bits = uint16_t[kMost + 2 * (kDrawing - 1)];
  alignas(64) Bits p, m, v;

  DrawnPairs pairs() const { return {pairs(p), pairs(v)}; }

  // Draws for elements [i, i + n) of a row: for the moments in `random`, and for the parameter or its
  // average.
  void fill(const NarrowKernels& k, const Row& row, uint32_t step, int64_t i, int64_t n, unsigned random,
            uint64_t of_average = 0) {
    for (int64_t at = 0, some; at < n; at += some) {
      const int64_t lap = (i + at) / row.run;
      some = std::min(n - at, (lap + 1) * row.run - (i + at));
      const uint64_t first = uint64_t(row.offset + i + at + lap * row.skip);
      const int64_t lead = first % kDrawing, groups = (lead + some + kDrawing - 1) / kDrawing;
      uint16_t* const own = p + at;
      k.philox(row.seed, first / kDrawing | of_average, step, row.index, own, groups);
      if (random & ~RANDOM_PARAM) k.exchange(pairs(own), pairs(other), groups * kDrawing / 2);
      if (random & RANDOM_FIRST_MOMENT)
        k.for_moments(own + lead, other + lead, FirstMoment::kFactor, m + at, some);
      if (random & RANDOM_SECOND_MOMENT)
        k.for_moments(own + lead, other + lead, SecondMoment::kFactor, v + at, some);
      if (lead) std::memmove(own, own + lead, some * sizeof(*own));
    }
  }

private:
  alignas(64) Bits other;  // the halves of neighbours

  static DrawnPair* pairs(uint16_t* bits) { return reinterpret_cast<DrawnPair*>(bits); }
  static const DrawnPair* pairs(const uint16_t* bits) { return reinterpret_cast<const DrawnPair*>(bits); }
};

int states_of(Rule rule) {
  if (rule == Rule::adam_no_first_moment) return Adam<Rule::adam_no_first_moment>::kStates;
  if (is_adam(rule)) return has_maximum(rule) ? kMaxStates : Adam<Rule::adam>::kStates;
  return rule == Rule::sgd ? Sgd<false>::kStates : Sgd<true>::kStates;
}
int second_moment_of(Rule rule) {
  if (rule == Rule::adam_no_first_moment) return Adam<Rule::adam_no_first_moment>::kSecondMoment;
  return is_adam(rule) ? Adam<Rule::adam>::kSecondMoment : Sgd<false>::kSecondMoment;
}

// Prefetches the beginning of a row. Small tensors end before the processor sees that they are streams:
// without this, a step of 10,000 tensors of 64 elements takes 1.2 times as long.
FUSED_HD void prefetch(const Row& row) {
  const auto lines = [&row](const void* stream, Format format) {
    const int64_t bytes = std::min(kBlock, row.numel) * kItemsize[int(format)];
    for (int64_t i = 0; i < bytes; i += 64) FUSED_PREFETCH(static_cast<const char*>(stream) + i);
  };
  lines(row.p, row.p_format);
  lines(row.g, row.g_format);
  for (int j = 0; j < states_of(row.rule); ++j) lines(row.state[j], row.state_format);
}

double* squares_at(const Row& row, int64_t i) { return row.squares ? row.squares + i / kPart * 3 : nullptr; }

// Steps a row whose streams are all in the compute type, and returns true; or returns false. By step_span(),
// which sets up streams and tiles, a row of 64 elements takes 1.5 times as long.
template <typename T>
bool step_native(const IsaTable& isa, const Row& row, const double* scalars, int64_t begin, int64_t end) {
  const int states = states_of(row.rule);
  const bool native = row.p_format == kNative<T> && row.g_format == kNative<T> && !row.ema;
  if (!native || (states && row.state_format != kNative<T>)) return false;
  const Update update = kernels_of(isa, T()).updates.of(row);
  for (int64_t n; begin < end; begin += n) {
    n = row.squares ? std::min(kPart, end - begin) : end - begin;
    void* s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = static_cast<T*>(row.state[j]) + begin;
    update(scalars, n, static_cast<T*>(row.p) + begin, static_cast<const T*>(row.g) + begin, s, {},
           squares_at(row, begin));
  }
  return true;
}

template <typename T>
void step_span(const IsaTable& isa, const Row& row, const double* scalars, int64_t begin, int64_t end) {
  if (row.squares) std::fill(squares_at(row, begin), squares_at(row, end + kPart - 1), 0);
  if (step_native<T>(isa, row, scalars, begin, end)) return;
  alignas(64) T tiles[2 + kMaxStates][kTile];
  Drawn drawn;
  const int states = states_of(row.rule), second = second_moment_of(row.rule);
  const uint32_t step = uint32_t(scalars[SCALAR_STEP]);
  Stream<T> p{&isa, static_cast<char*>(row.p), row.p_format, tiles[0]};
  const Stream<T> g{&isa, static_cast<char*>(const_cast<void*>(row.g)), row.g_format, tiles[1]};
  Stream<T> x[kMaxStates];
  p.master = row.master, p.extra = static_cast<char*>(row.extra);
  const unsigned random = row.stochastic ? random_streams(p.format, p.master, states > 0 && second != 0,
                                                          second >= 0, row.state_format)
                                         : 0;
  if (random & RANDOM_PARAM) p.random = drawn.p;
  // An average takes parameters before they are rounded, and finds them in the L1 cache, a tile at a time. A
  // narrow one has the tile of the gradient, which is no longer needed.
  Stream<T> ema{&isa, static_cast<char*>(row.ema), row.ema_format, tiles[1]};
  if (!ema.native()) ema.random = drawn.p;
  bool bf16 = !row.ema && p.format == Format::bf16 && p.master == Master::none && g.format == Format::bf16;
  for (int j = 0; j < states; ++j) {
    x[j] = {&isa, static_cast<char*>(row.state[j]), row.state_format, tiles[2 + j]};
    x[j].second_moment = j == second;
    if (j == second && random & RANDOM_SECOND_MOMENT) x[j].random = drawn.v;
    if (j == 0 && random & RANDOM_FIRST_MOMENT) x[j].random = drawn.m;
    if (x[j].format == Format::i8) x[j].scales = row.scales[j];
    bf16 = bf16 && x[j].format == Format::bf16;
  }
  if (bf16) {
    const int64_t even = end - (end - begin) % 2, most = random        ? Drawn::kMost
                                                         : row.squares ? kPart
                                                                       : even - begin;
    const Update pairs = (random ? isa.narrow.random_pairs : isa.narrow.pairs).of(row);
    for (int64_t n; begin < even; begin += n) {
      n = std::min(most, even - begin);
      void* s[kMaxStates] = {};
      for (int j = 0; j < states; ++j) s[j] = x[j].at(begin);
      if (random) drawn.fill(isa.narrow, row, step, begin, n, random);
      pairs(scalars, n / 2, p.at(begin), g.at(begin), s, drawn.pairs(), squares_at(row, begin));
    }
  }
  const Update update = kernels_of(isa, T()).updates.of(row);
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = std::min(kTile, end - i);
    void* s[kMaxStates] = {};
    for (int j = 0; j < states; ++j) s[j] = x[j].read(i, n);
    T* const values = p.read(i, n);
    update(scalars, n, values, g.read(i, n), s, {}, squares_at(row, i));
    if (row.ema) {
      kernels_of(isa, T()).average(ema.read(i, n), values, T(scalars[SCALAR_EMA]), n);
      if (ema.random) drawn.fill(isa.narrow, row, step, i, n, 0, kAverageWords);
      ema.write(i, n);
    }
    if (random) drawn.fill(isa.narrow, row, step, i, n, random);
    p.write(i, n);
    for (int j = 0; j < states; ++j) x[j].write(i, n);
  }
}

}  // namespace

const char* const* cpu_isas() {
  static const char* names[4] = {"generic"};
#ifdef FUSED_X86
  static const bool once = [] {
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;  // __builtin_cpu_supports("f16c") is an error with some compilers
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
  const bool measures = std::any_of(rows, rows + n, [](const Row& row) { return row.squares; });
  const int64_t block = measures ? kPart : kBlock;
  std::vector<int64_t> ends(n);  // the number of blocks up to and including each row
  int64_t blocks = 0, work = 0;
  for (int64_t r = 0; r < n; ++r) {
    ends[r] = blocks += (rows[r].numel + block - 1) / block;
    work += (rows[r].numel + kBlock - 1) / kBlock * kBlock;
  }

  const auto run = [&](int64_t first, int64_t last) {
    int64_t r = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
    for (int64_t b = first; b < last; b = ends[r++]) {
      const Row& row = rows[r];
      const int64_t start = r ? ends[r - 1] : 0;
      const int64_t begin = (b - start) * block, end = std::min(row.numel, (last - start) * block);
      if (begin == 0 && r + kRowsAhead < n) prefetch(rows[r + kRowsAhead]);
      if (begin >= end) continue;
      const double* s = scalars + int64_t(row.scalars) * SCALARS;
      if (row.p_format == Format::f64) {
        step_span<double>(kIsas[isa], row, s, begin, end);
      } else {
        step_span<float>(kIsas[isa], row, s, begin, end);
      }
    }
  };
  for_each_part(blocks, work, run);
}

}  // namespace fused_adamw
