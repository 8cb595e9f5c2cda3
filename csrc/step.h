// The contract of a launch: rows of addresses in, one step of all of them. No torch header.
#pragma once

#include <cstdint>

#include "formats.h"
#include "rules.h"

#if defined(__GNUC__)
#define FUSED_PREFETCH(address) __builtin_prefetch(address)
#else
#define FUSED_PREFETCH(address) ((void)(address))
#endif

namespace fused_adamw {

enum class Rule : uint8_t { adam, adam_amsgrad, sgd, sgd_momentum };

// One tensor: all its streams are dense and laid out alike, so that element i of each belongs together.
struct Row {
  void* p;
  const void* g;
  void* state[kMaxStates];
  int64_t numel;
  int32_t scalars;  // index of the scalar row
  Rule rule;
  Format p_format, g_format, state_format;
  Master master;
  bool stochastic;  // a bf16 parameter without a master, a bf16 second moment, int8 moments are rounded so

  void* extra;       // of the master
  float* scales[2];  // of int8 states, one each kQuantBlock elements
  uint64_t seed;     // of stochastic rounding
  uint32_t index;    // of the parameter
  // Element i is number offset + i + i / run * skip of a parameter of which this is a shard.
  int64_t offset, run, skip;
};

// One step of every row in one parallel region; `scalars` holds rows of kScalars doubles. `isa` is an
// index into cpu_isas(). The result has the same bits for any isa and any number of threads.
void step_cpu(const Row* rows, int64_t n, const double* scalars, int isa);

// The sum of the squares of all gradients; the same bits for any number of threads.
double sum_squares_cpu(const Row* rows, int64_t n);

// What a compiled CUDA kernel depends on.
struct Variant {
  Rule rule;
  Format p, g, state;  // never f64
  Master master;
  bool stochastic;
};

constexpr int kColumns = 16;  // of the table of rows

// CUDA, over tables in device memory (fused_adamw/launch.py tells what is in them), on a stream of the
// current device. They return cudaGetErrorString of what went wrong, or nullptr.
struct Tables {
  const int64_t* rows;
  const int32_t* chunks;
  int64_t count;  // of chunks
  int32_t chunk;  // elements of each, a multiple of 8
};
// One step of every element, with gradients multiplied by *factor; none if that is negative.
const char* step_cuda(const Variant& variant, const Tables& tables, const float* scalars, const float* factor,
                      void* stream);
// The sums of the squares of the gradients of each chunk.
const char* sum_squares_cuda(const Variant& variant, const Tables& tables, double* sums, void* stream);
// Advance `n` counters at the addresses in `steps`, unless *factor is negative, and compute their rows of
// scalars.
const char* scalars_cuda(const Variant& variant, const double* hyper, const int64_t* steps, int64_t n,
                         const float* factor, float* scalars, void* stream);
// Whether a variant is compiled, as that of a step has to be.
bool has_cuda(const Variant& variant);
// Whether there is code for the current device.
const char* check_cuda(const Variant& variant);

// Names of the instruction sets this CPU can run, slowest first; nullptr past the last.
const char* const* cpu_isas();

}  // namespace fused_adamw
