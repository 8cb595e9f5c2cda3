// The contract of a launch: it takes rows of addresses and steps all of them once. No torch header.
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

// Squares are summed by so many elements, and these sums are added in one order, so that the number of
// threads makes no difference.
constexpr int64_t kPart = 8192;

// One tensor. All its streams are dense and laid out alike: element i of one belongs to element i of the
// others.
struct Row {
  void* p;
  const void* g;
  void* state[kMaxStates];
  int64_t numel;
  int32_t scalars;  // index of its row of scalars
  Rule rule;
  Format p_format, g_format, state_format;
  Master master;
  bool stochastic;  // random_streams() of formats.h are rounded stochastically

  void* extra;       // the stream of the master
  float* scales[2];  // of int8 states, one for every kQuantBlock elements
  // Sums of squares of the gradient, the update and the new parameter, three for each kPart elements; nullptr
  // where they are not asked for.
  double* squares;
  void* ema;          // the average of the parameter; nullptr where none is kept
  Format ema_format;  // the type of the arithmetic, or bf16, which is rounded stochastically
  // Stochastic rounding draws by the seed, the index of the parameter, and the number of an element in the
  // whole parameter. Of a shard, element i has the number offset + i + i / run * skip.
  uint64_t seed;
  uint32_t index;
  int64_t offset, run, skip;
};

// Steps every row once, in one parallel region. `scalars` holds rows of SCALARS doubles, `isa` is an index
// into cpu_isas(). The result has the same bits for any isa and any number of threads. They flush subnormal
// numbers to 0 where the calling thread does.
void step_cpu(const Row* rows, int64_t n, const double* scalars, int isa);

// Returns the sum of the squares of all gradients, the same bits for any number of threads.
double sum_squares_cpu(const Row* rows, int64_t n);

// What a compiled CUDA kernel depends on.
struct Variant {
  Rule rule;
  Format p, g, state;  // never f64
  Master master;
  bool stochastic, measured;
};

// The columns of the table of rows on a device, int64 each: the fields of a Row that the kernels read.
enum Column {
  COL_PARAM,
  COL_GRAD,
  COL_STATE,                           // the first of kMaxStates
  COL_NUMEL = COL_STATE + kMaxStates,  // its complement, which is negative, where a step leaves the row out
  COL_SCALARS,
  COL_FLAGS,
  COL_EXTRA,
  COL_SCALES,                // the first of two
  COL_EMA = COL_SCALES + 2,  // 0 where no average is kept
  COL_SEED,
  COL_INDEX,
  COL_OFFSET,
  COL_RUN,
  COL_SKIP,
  COLUMNS = COL_SKIP + 2,  // an even number, so that what follows the rows is aligned to 16 bytes
};
// Bits of COL_FLAGS. SHARD_ALIGNED: the numbering of the shard's elements (offset, run, skip) keeps to
// multiples of 8, or nothing is drawn by it. ALIGNED: SHARD_ALIGNED, and every address is a multiple of 16.
// EMA_BF16: the average is bf16, not f32.
enum Flag { ALIGNED = 1, SHARD_ALIGNED = 2, EMA_BF16 = 4 };

// The CUDA functions take tables in device memory, which fused_adamw/gpu.py fills, and a stream of the
// current device. They return cudaGetErrorString of what went wrong, or nullptr.
struct Tables {
  const int64_t* rows;
  const int32_t* chunks;  // pairs: a row, and the number of the chunk in its tensor
  int64_t count;          // of chunks
  int32_t chunk;          // elements of a chunk, a multiple of kQuantBlock: no two chunks share a scale
};
// Two rows of scalars, which go with a launch; where there are none, the rows lie on the device.
struct ScalarRow {
  float x[SCALARS];
};
struct GivenScalars {
  int32_t any;
  ScalarRow rows[2];
};
// Steps every element once, with gradients multiplied by *factor. A negative *factor leaves everything as it
// is. A variant that is measured writes to `sums`, [3, chunks], the sums of the squares of the gradients
// times *factor, of the updates and of the new parameters of each chunk.
const char* step_cuda(const Variant& variant, const Tables& tables, const float* scalars, const float* factor,
                      double* sums, const GivenScalars& given, void* stream);
// Writes for each chunk the sum of the squares of its gradients.
const char* sum_squares_cuda(const Variant& variant, const Tables& tables, double* sums, void* stream);
// Advances the `n` counters at the addresses in `steps` and computes their rows of scalars from rows of
// HYPERS hyperparameters. An address of 0 leaves its row out. A negative *factor leaves all as it is. `rates`
// has addresses of learning rates: of a double, or the complement of a float's; 0 where `hyper` has the rate.
const char* scalars_cuda(const Variant& variant, const double* hyper, const int64_t* rates,
                         const int64_t* steps, int64_t n, const float* factor, float* scalars, void* stream);
// Whether a variant is compiled. step_cuda and check_cuda may be called for no other.
bool has_cuda(const Variant& variant);
// Returns the error of loading the variant's kernel on the current device, or nullptr.
const char* check_cuda(const Variant& variant);

// Names of the instruction sets that this CPU can run, slowest first; a nullptr ends them.
const char* const* cpu_isas();

}  // namespace fused_adamw
