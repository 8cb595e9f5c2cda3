// The contract of a launch: rows of addresses in, one step of all of them. No torch header.
#pragma once

#include <cstdint>

#include "formats.h"
#include "rules.h"

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
};

// One step of every row in one parallel region; `scalars` holds rows of kScalars doubles. `isa` is an
// index into cpu_isas(). The result has the same bits for any isa and any number of threads.
void step_cpu(const Row* rows, int64_t n, const double* scalars, int isa);

// Names of the instruction sets this CPU can run, slowest first; nullptr past the last.
const char* const* cpu_isas();

}  // namespace fused_adamw
