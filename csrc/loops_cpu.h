// The loops of the CPU backend, written once for every instruction set: a function compiled for one inlines
// them (FUSED_HD), and the compiler vectorises them for it.
#pragma once

#include <algorithm>
#include <limits>

#include "step.h"

#if defined(__GNUC__)
#define FUSED_RESTRICT __restrict__
#else
#define FUSED_RESTRICT
#endif

// Lets the compiler split the sums of a loop into those of the lanes of a vector.
#if defined(__GNUC__)
#define FUSED_PRAGMA(text) _Pragma(#text)
#define FUSED_SIMD(clauses) FUSED_PRAGMA(omp simd clauses)
#else
#define FUSED_SIMD(clauses)
#endif

namespace fused_adamw {

// Narrow formats are converted through tiles that stay in the L1 cache: at most 6 of 4 KiB.
constexpr int64_t kTile = 512;
static_assert(kTile % kQuantBlock == 0, "a tile is a number of whole blocks");
static_assert(kPart % (2 * kTile) == 0, "no tile is of two parts");

// A word of a stream is one value of the compute type, or a pair of bf16, which is unpacked and packed in
// place. Through tiles of floats, which widen and narrow across the vector, a step of all-bf16 takes 1.25
// times as long. A pair is aligned as its values are, and its bits are copied: it may begin at any of them.
template <class Value> struct PairOf {
  Value values[2];
  FUSED_HD uint32_t bits() const { return bit_cast<uint32_t>(*this); }  // the lower address is the lower half
  FUSED_HD void set(uint32_t bits) { *this = bit_cast<PairOf>(bits); }
};
using Pair = PairOf<BFloat16>;
template <class Word> constexpr int kLanes = 1;
template <> inline constexpr int kLanes<Pair> = 2;

template <typename T> FUSED_HD void unpack(T word, T* x) { *x = word; }
template <typename T> FUSED_HD void pack(const T* x, T& word) { word = *x; }
FUSED_HD void unpack(Pair word, float* x) {
  x[0] = bit_cast<float>(word.bits() << 16);
  x[1] = bit_cast<float>(word.bits() & 0xffff0000u);
}

// Rounds as store() of formats.h does, but a NaN keeps its sign and payload, because looking for one in every
// value takes a fifth of the time. fix_nans() mends the tiles that have one. The addition cannot carry out of
// a NaN: one that is computed from bf16 values has a low half of 0.
FUSED_HD uint32_t rounded(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
FUSED_HD void pack(const float* x, Pair& word) {
  word.set((rounded(x[1]) & 0xffff0000u) | rounded(x[0]) >> 16);
}
// Rounds as store_stochastic() does, but for NaN, as above. `random` has 16 bits for each value.
FUSED_HD void pack(const float* x, Pair& word, uint32_t random) {
  const uint32_t low = bit_cast<uint32_t>(x[0]) + (random & 0xffffu);
  word.set(((bit_cast<uint32_t>(x[1]) + (random >> 16)) & 0xffff0000u) | low >> 16);
}
// Sums in double would take 0.2 ns an element longer (AVX-512): to widen the values does not hide behind
// memory.
template <typename T> FUSED_HD void add_square(T& sum, T x) { sum = fma(x, x, sum); }

template <typename T> void fix_nans(T*, int64_t) {}
inline void fix_nans(Pair* words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float x[2];
    BFloat16 low, high;
    unpack(words[i], x);
    store(x[0], low);
    store(x[1], high);
    words[i].set(uint32_t(high.bits) << 16 | low.bits);
  }
}

using DrawnPair = PairOf<uint16_t>;
// What parameters and second moments draw.
struct DrawnPairs {
  const DrawnPair *p, *v;
};

// Updates word i of the streams. `nan` collects whether a new parameter is NaN: every rule that makes a state
// NaN makes the parameter NaN too.
template <class R, typename T, bool kRandom, bool kMeasured, class Word>
FUSED_HD void update_word(const typename R::template Scalars<T>& s, int64_t i, Word* FUSED_RESTRICT p,
                          const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                          Word* FUSED_RESTRICT s2, const DrawnPair* FUSED_RESTRICT drawn_p,
                          const DrawnPair* FUSED_RESTRICT drawn_v, uint32_t& nan, T& of_g, T& of_update,
                          T& of_p) {
  constexpr int lanes = kLanes<Word>;
  T xp[lanes], xg[lanes], x0[lanes] = {}, x1[lanes] = {}, x2[lanes] = {};
  unpack(p[i], xp);
  unpack(g[i], xg);
  if constexpr (R::kStates > 0) unpack(s0[i], x0);
  if constexpr (R::kStates > 1) unpack(s1[i], x1);
  if constexpr (R::kStates > 2) unpack(s2[i], x2);
  for (int l = 0; l < lanes; ++l) {
    const T before = xp[l];
    xp[l] = R::update(s, before, xg[l], x0[l], x1[l], x2[l]);
    if constexpr (kMeasured) {
      add_square(of_g, s.grad_factor * xg[l]);
      add_square(of_update, xp[l] - before);
      add_square(of_p, xp[l]);
    }
  }
  if constexpr (kRandom) {
    pack(xp, p[i], drawn_p[i].bits());
    if constexpr (R::kSecondMoment == 1) pack(x1, s1[i], drawn_v[i].bits());
  } else {
    pack(xp, p[i]);
    if constexpr (R::kStates > 1) pack(x1, s1[i]);
  }
  if constexpr (lanes > 1) nan |= (p[i].bits() & 0x7fff7fffu) + 0x007f007fu;
  if constexpr (kRandom && R::kSecondMoment == 0)
    pack(x0, s0[i], drawn_v[i].bits());
  else if constexpr (R::kStates > 0)
    pack(x0, s0[i]);
  if constexpr (R::kStates > 2) pack(x2, s2[i]);
}

// Returns whether a new parameter is NaN. Adds to `squares`, if kMeasured, the sums of the squares of
// gradients, updates and new parameters, in an order that follows the vectors.
template <class R, typename T, bool kRandom, bool kMeasured, class Word>
FUSED_HD bool update_words(const typename R::template Scalars<T>& s, int64_t n, Word* FUSED_RESTRICT p,
                           const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                           Word* FUSED_RESTRICT s2, const DrawnPair* FUSED_RESTRICT drawn_p,
                           const DrawnPair* FUSED_RESTRICT drawn_v, double* squares) {
  uint32_t nan = 0;
  T of_g = 0, of_update = 0, of_p = 0;
  if constexpr (kMeasured) {
    FUSED_SIMD(reduction(+ : of_g, of_update, of_p) reduction(| : nan))
    for (int64_t i = 0; i < n; ++i)
      update_word<R, T, kRandom, true>(s, i, p, g, s0, s1, s2, drawn_p, drawn_v, nan, of_g, of_update, of_p);
    squares[0] += of_g, squares[1] += of_update, squares[2] += of_p;
  } else {
    for (int64_t i = 0; i < n; ++i)
      update_word<R, T, kRandom, false>(s, i, p, g, s0, s1, s2, drawn_p, drawn_v, nan, of_g, of_update, of_p);
  }
  return nan & 0x80008000u;
}

template <class R, typename T, bool kRandom, bool kMeasured, class Word>
FUSED_HD void update_loop(const double* scalars, int64_t n, Word* FUSED_RESTRICT p,
                          const Word* FUSED_RESTRICT g, Word* FUSED_RESTRICT s0, Word* FUSED_RESTRICT s1,
                          Word* FUSED_RESTRICT s2, const DrawnPairs& drawn, double* squares) {
  using S = typename R::template Scalars<T>;
  constexpr int count = sizeof(S) / sizeof(T);
  static_assert(count <= SCALARS, "a rule has no more scalars than a row");
  T row[count];
  for (int i = 0; i < count; ++i)
    row[i] = scalars[i] != scalars[i] ? std::numeric_limits<T>::quiet_NaN() : T(scalars[i]);
  S s;
  std::memcpy(&s, row, sizeof(s));
  const int64_t tile = kLanes<Word> == 1 ? n : kTile;
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = std::min(tile, n - i);
    Word* x[] = {p + i, s0 + i, s1 + i, s2 + i};
    const DrawnPair* const drawn_p = kRandom ? drawn.p + i : nullptr;
    const DrawnPair* const drawn_v = kRandom ? drawn.v + i : nullptr;
    bool nan;
    // The condition settles lerp's choice within each of the two calls. In one loop for both, the compiler
    // would divide twice.
    if (R::kStates > 1 && row[SCALAR_W1] < T(0.5)) {
      nan = update_words<R, T, kRandom, kMeasured>(s, m, x[0], g + i, x[1], x[2], x[3], drawn_p, drawn_v,
                                                   squares);
    } else {
      nan = update_words<R, T, kRandom, kMeasured>(s, m, x[0], g + i, x[1], x[2], x[3], drawn_p, drawn_v,
                                                   squares);
    }
    for (int j = 0; nan && j <= R::kStates; ++j) fix_nans(x[j], m);
  }
}

// Moves averages towards new parameters.
template <typename T>
FUSED_HD void average_loop(T* FUSED_RESTRICT ema, const T* FUSED_RESTRICT p, T weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i], weight);
}

template <class S, typename T> FUSED_HD void load_loop(const void* from, T* FUSED_RESTRICT to, int64_t n) {
  const S* FUSED_RESTRICT source = static_cast<const S*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = T(load(source[i]));
}

template <class S, typename T> FUSED_HD void store_loop(const T* FUSED_RESTRICT from, void* to, int64_t n) {
  S* FUSED_RESTRICT target = static_cast<S*>(to);
  for (int64_t i = 0; i < n; ++i) store(from[i], target[i]);
}

template <Master kMaster, class P>
FUSED_HD void read_master_loop(const void* p, const void* extra, float* FUSED_RESTRICT to, int64_t n) {
  using M = Mastered<kMaster>;
  const P* FUSED_RESTRICT high = static_cast<const P*>(p);
  const auto* FUSED_RESTRICT low = static_cast<const typename M::template Extra<P>*>(extra);
  for (int64_t i = 0; i < n; ++i) to[i] = M::read(high[i], low[i]);
}

template <Master kMaster, class P>
FUSED_HD void write_master_loop(const float* FUSED_RESTRICT from, void* p, void* extra, int64_t n) {
  using M = Mastered<kMaster>;
  P* FUSED_RESTRICT high = static_cast<P*>(p);
  auto* FUSED_RESTRICT low = static_cast<typename M::template Extra<P>*>(extra);
  for (int64_t i = 0; i < n; ++i) M::write(from[i], high[i], low[i]);
}

// Rounds stochastically.
FUSED_HD void store_random_loop(const float* FUSED_RESTRICT from, void* to,
                                const uint16_t* FUSED_RESTRICT random, int64_t n) {
  BFloat16* FUSED_RESTRICT target = static_cast<BFloat16*>(to);
  for (int64_t i = 0; i < n; ++i) store_stochastic(from[i], target[i], random[i]);
}

// A full block has a number of elements that the compiler knows.
template <class Q, bool kFull> FUSED_HD void decode_block(const typename Q::Code* FUSED_RESTRICT from,
                                                          float unit, float* FUSED_RESTRICT to, int64_t n) {
  if (kFull) n = kQuantBlock;
  for (int64_t i = 0; i < n; ++i) to[i] = Q::decode(from[i], unit);
}

template <class Q>
FUSED_HD void decode_loop(const void* codes, const float* scales, float* FUSED_RESTRICT to, int64_t n) {
  const auto* from = static_cast<const typename Q::Code*>(codes);
  for (; n >= kQuantBlock; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock)
    decode_block<Q, true>(from, Q::decoding(*scales++), to, kQuantBlock);
  if (n) decode_block<Q, false>(from, Q::decoding(*scales), to, n);
}

template <class Q, bool kFull, bool kRandom>
FUSED_HD void encode_block(const float* FUSED_RESTRICT from, uint8_t* FUSED_RESTRICT to, float* scale,
                           const uint16_t* FUSED_RESTRICT random, int64_t n) {
  if (kFull) n = kQuantBlock;
  int32_t most = 0;  // signed, because AVX2 compares no unsigned integers
  for (int64_t i = 0; i < n; ++i) most = std::max(most, int32_t(magnitude_bits(from[i])));
  *scale = scale_of(uint32_t(most));
  const float factor = Q::encoding(*scale);
  for (int64_t i = 0; i < n; ++i)
    to[i] = Q::template encode<kRandom>(from[i], factor, kRandom ? random[i] : 0);
}

template <class Q, bool kRandom>
FUSED_HD void encode_loop(const float* from, void* codes, float* scales, const uint16_t* random, int64_t n) {
  uint8_t* to = static_cast<uint8_t*>(codes);
  for (; n >= kQuantBlock; n -= kQuantBlock, from += kQuantBlock, to += kQuantBlock) {
    encode_block<Q, true, kRandom>(from, to, scales++, random, kQuantBlock);
    if (kRandom) random += kQuantBlock;
  }
  if (n) encode_block<Q, false, kRandom>(from, to, scales, random, n);
}

// Writes the random words of `groups` counters, from number `group` on.
inline void philox_loop(uint64_t seed, uint64_t group, uint32_t step, uint32_t index, uint16_t* to,
                        int64_t groups) {
  for (; groups > 0; --groups, to += kDrawing) {
    const Words words = philox(seed, group++, step, index);
    std::memcpy(to, words.x, sizeof(words));
  }
}

// Writes the words with which neighbours see each other's halves.
FUSED_HD void exchange_loop(const DrawnPair* FUSED_RESTRICT words, DrawnPair* FUSED_RESTRICT to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i].set(exchanged(words[i].bits()));
}

// Writes what moments draw.
FUSED_HD void for_moments_loop(const uint16_t* FUSED_RESTRICT own, const uint16_t* FUSED_RESTRICT other,
                               uint16_t factor, uint16_t* FUSED_RESTRICT to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = uint16_t(for_moment(own[i], other[i], factor));
}

}  // namespace fused_adamw
