// Family `semi24`: weights of which two of every four along a row are kept (2:4), compressed to half.
//
//   W [n, m] is read as padded with zero columns to G = ceil(m / 4) groups of four. A mask is 2:4 when the padded
//   matrix keeps exactly two of every group: two of every whole group, and of a last group of w < 4 columns at most two
//   and at least 2 - (4 - w).
//
//   values [n, 2 G]  the kept elements, columns ascending; a kept padding column is a zero.
//   code of a group  4 bits: first kept position | second kept position << 2; first < second. Six codes exist:
//                    0x4 (0,1)  0x8 (0,2)  0xC (0,3)  0x9 (1,2)  0xD (1,3)  0xE (2,3)
//
// Layouts of (values, meta):
//   plain  values [n, 2 G], any float type; meta uint8 [n, ceil(G / 2)]: group 2 b in the low half of byte b, group
//          2 b + 1 in the high half; the last half of an odd G is 0x4. The format of checkpoints, on every device.
//   sm80   bf16, fp16. N = round_up(n, 32), M = round_up(m, 64), padding is zeros with code 0x4. values [N, M / 2];
//   meta
//          int16 [N, M / 16]: words of four groups, the first group lowest, in the order of CUTLASS 2.x'
//          ColumnMajorInterleaved<2> after its reorder_meta: what torch's SparseSemiStructuredTensorCUTLASS holds.
//   sm90   bf16, fp16. N = round_up(n, 64), M = round_up(m, kSm90TileK). values [N, M / 2]; meta uint8 [N * M / 8] in
//          the order of CUTLASS 3.x' Sm90 TensorEAtom_16bit (sm90_sparse_config.inl) of a GEMM whose tile is kSm90TileK
//          deep.
#pragma once

#include "slkernels/types.h"

namespace slk {

enum class Layout24 : int { plain, sm80, sm90 };
enum class Prune24 : int { rows, transposable };

// Dense columns of the sm_90a GEMM's tile along K. The metadata's order depends on it: compressor and GEMM share it.
constexpr int64_t kSm90TileK = 128;

constexpr int64_t groups24(int64_t m) {
  return ceil_div(m, 4);
}
constexpr int64_t kept24(int64_t m) {
  return 2 * groups24(m);
}
constexpr int64_t padded_rows24(Layout24 layout, int64_t n) {
  return layout == Layout24::plain ? n : round_up(n, layout == Layout24::sm80 ? 32 : 64);
}
constexpr int64_t padded_columns24(Layout24 layout, int64_t m) {
  return layout == Layout24::plain ? 4 * groups24(m) : round_up(m, layout == Layout24::sm80 ? 64 : kSm90TileK);
}

}  // namespace slk
