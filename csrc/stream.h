// What the bench holds a step against: the same reads and writes with next to nothing computed.
#pragma once

#include <cstdint>

namespace fused_adamw {

constexpr int64_t kStreamBlock = 128;  // elements: of one byte, two lines
constexpr int kMaxArrays = 8;

// An array of `blocks` * kStreamBlock elements of `width` bytes each.
struct Array {
  uint64_t* data;
  int64_t width;
};

// Reads all n arrays once, block by block, side by side, and writes the first `written` of them where they
// were read: to each line of 64 bytes of a block is added the sum of all lines of that block in all arrays.
void stream_cpu(const Array* arrays, int n, int written, int64_t blocks);

}  // namespace fused_adamw
