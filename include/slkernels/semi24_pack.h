// Family `semi24`, packing: masks from magnitudes, and the compressed formats (semi24.h) from and to dense matrices.
//
// Matrices and masks (bytes 0, 1) are contiguous. Values are moved, not computed with: they keep their bits.
#pragma once

#include "slkernels/semi24.h"

namespace slk {

// An [n, m] weight in `layout`. Padding (rows from n on, groups from groups24(m) on, the half byte after an odd plain
// row) is written by whoever allocates: values 0, codes 0x4. The kernels write the rest.
struct Packed24 {
  void *values, *meta;
  Layout24 layout;
  int64_t n, m;
  constexpr int64_t rows() const { return padded_rows24(layout, n); }
  constexpr int64_t row_values() const { return padded_columns24(layout, m) / 2; }
  constexpr int64_t meta_bytes() const {
    return layout == Layout24::plain ? n * ceil_div(m, 8) : rows() * row_values() / 4;
  }
};

namespace cpu {

// Tiles are counted in rows of 4 x 4 tiles; `tiles` is a range of them. A block of tiles that is a multiple of
// kTileRows24 (or reaches the end) is written by one thread without sharing a byte with another.
constexpr int64_t kTileRows24 = 16;

struct Pack24Kernels {
  // mask [n, m] = prune24(score [n, m]).
  void (*prune)(DType, const void* score, int64_t n, int64_t m, Prune24, Range tiles, uint8_t* mask);
  // W's pack and, pruned again by rows, W_t's, from one pass over W [n, m]. score may be w. Not f64 in packed layouts.
  void (*prune_compress)(DType, const void* w, const void* score, Prune24, Range tiles, const Packed24& pack,
                         const Packed24& pack_t);
};
const Pack24Kernels& pack24_kernels();

// `bytes` is the size of an element: 2, 4 or 8.

// Packs the rows `rows` of W (*) mask. Returns the first group (row * groups24(m) + group) of the mask that is not 2:4,
// or -1; it is packed as two NaNs with code 0x4.
int64_t compress24(DType, const void* w, const uint8_t* mask, const Packed24&, Range rows);
// The rows `rows` of W [n, m], zero where nothing is kept, and of mask [n, m].
void decompress24(int bytes, const Packed24&, Range rows, void* w);
void mask_of24(const Packed24&, Range rows, uint8_t* mask);
// The rows `rows` of a weight in another layout.
void convert24(int bytes, const Packed24& from, const Packed24& to, Range rows);
// The first group of the rows `rows` whose code is none of the six, or -1.
int64_t check24(const Packed24&, Range rows);
// perm [m, 2 groups24(n)], for the rows `rows` of W_t; plain layouts. Position in values, or -1.
void repack24_perm(const Packed24& pack, const Packed24& pack_t, Range rows, int32_t* perm);
// values_t[i] = values[perm[i]], or zero where perm[i] is not in [0, count), for the rows `rows` of perm [.., columns].
void repack24_t(int bytes, const void* values, int64_t count, const int32_t* perm, int64_t columns, Range rows,
                void* values_t);

}  // namespace cpu
}  // namespace slk
