// Builders of BlockRows, the layout of block-sparse attention (the format: docs/attention.md).
//
// Row r = (b, mask head, q block) owns the slot [row_ptr[r], row_ptr[r] + width) of `idx` and fills row_cnt[r] entries
// of it: first row_nmask[r] partial tiles, then full ones, each class ascending. What lies behind them is never read.
// Slots have a fixed width, so that a builder's output has a size known beforehand: nothing waits for the device.
#pragma once

#include <string>

#include "slkernels/attention.h"
#include "slkernels/attention_layout.cuh"
#include "slkernels/types.h"
#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace slk {

struct RowLists {
  int32_t *ptr, *cnt, *nmask;  // [rows]
  int32_t* idx;                // [rows, width]
  int64_t rows, width;
};

// Bitmaps of partial tiles: bit j % 32 of word [tile, i, j / 32] is keep(i, j). Row r's n-th partial entry has bitmap
// r * per_row + n.
struct TileBits {
  int32_t* id;     // [rows, width]; -1: no bitmap
  uint32_t* bits;  // [rows * per_row, M, N / 32]
  int64_t per_row;
};

struct BlockMaskArgs {
  Tiling tiling;
  bool causal;
  const bool* mask;  // [rows, k_blocks]
};
struct TopkArgs {
  Tiling tiling;
  bool causal;
  const int32_t* indices;  // [rows, k] block ids; -1: none
  int64_t k;
};
struct IntervalArgs {
  Tiling tiling;
  const int32_t *lo, *hi;  // [rows / q_blocks, Sq]
  int64_t sink;
};
struct CuSeqlensArgs {
  const int32_t *cu_q, *cu_k;  // [documents + 1]
  int64_t documents, Sq;
  bool causal;
  int32_t *lo, *hi;  // [Sq], written
};
struct VerticalSlashArgs {
  int64_t block, S;
  const int32_t *vertical, *slash;  // [rows / q_blocks, verticals], [rows / q_blocks, slashes]
  int64_t verticals, slashes;
  int32_t *col_ptr, *col_idx;  // [rows + 1], [rows * verticals], written
};
struct DenseMaskArgs {
  Tiling tiling;
  const bool* mask;  // [rows / q_blocks, Sq, Sk]
};
struct TreeArgs {
  Tiling tiling;
  const int32_t* parent;  // [rows / q_blocks, Sq]; -1: a root
  const int32_t* prefix;  // [rows / q_blocks]: keys before the first node's
};

// The lists of every kv block: col (group, jk) holds the q blocks that list it, partial first, each class ascending.
struct TransposedLists {
  int32_t *ptr, *cnt, *nmask;  // [groups, k_blocks]
  int32_t *idx, *bit_id;       // [capacity], compact; bit_id null where the layout has none
};

namespace cpu {

// All take a range of rows and may run in parallel over ranges, unless they say otherwise.
void layout_block_mask(const BlockMaskArgs&, const RowLists&, Range rows);
void layout_topk(const TopkArgs&, const RowLists&, Range rows);
void layout_interval(const IntervalArgs&, const RowLists&, Range rows);
void layout_dense_mask(const DenseMaskArgs&, const RowLists&, const TileBits&, Range rows);
void layout_tree(const TreeArgs&, const RowLists&, const TileBits&, Range rows);
// Whole, in one call.
void layout_cu_seqlens(const CuSeqlensArgs&);
void layout_vertical_slash(const VerticalSlashArgs&, const RowLists&);
void layout_transpose(const BlockRows&, const TransposedLists&, int64_t k_blocks);

// The first fault of a layout in words ("row 3 (batch 0, head 1, block 1): ..."), empty if there is none; needs
// nothing of the layout to be right.
std::string layout_fault(const BlockRows&, int64_t Sk);

}  // namespace cpu
}  // namespace slk
