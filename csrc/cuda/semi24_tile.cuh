// What the kernels of family `semi24` share: 4 x 4 tiles in a thread's registers, their packing, and where packs lie.
#pragma once

#include "cuda/types.cuh"
#include "slkernels/ptx/arith.h"
#include "slkernels/ptx/global.h"
#include "slkernels/ptx/math.h"
#include "slkernels/semi24.cuh"
#include "slkernels/semi24_pack.h"

namespace slk::cuda {

constexpr int kChunk24 = 8;  // columns that a thread handles in a row: 16 bytes of a 16-bit type, a byte of metadata

// ---- packs ----------------------------------------------------------------------------------------------------------

// The byte of metadata of columns 8 chunk .. 8 chunk + 7.
__device__ inline int64_t meta_byte(const Packed24& pack, int64_t row, int64_t chunk) {
  if (pack.layout == Layout24::plain) return row * ((pack.m + kChunk24 - 1) / kChunk24) + chunk;
  return 2 * packed_word24(pack.layout, row, chunk / 2, pack.rows()) + chunk % 2;
}

// Four bits as four bytes.
__device__ inline uint32_t bytes_of(uint32_t bits) {
  return (bits & 15) * 0x00204081u & 0x01010101u;
}

// ---- slots ----------------------------------------------------------------------------------------------------------

// The two slots of four groups, a byte a group, from a word of which bit 4 g + i says that group g keeps element i.
//
// Of four bits, two set, the lower three tell which. They index the eight bytes from which prmt picks, for four groups
// at once.
struct Slots24 {
  uint32_t code;           // as in metadata
  uint32_t first, second;  // prmt selectors of that element of 16 bits among the four in two registers
};
__device__ inline Slots24 slots24(uint32_t word) {
  const uint32_t index = word & 0x7777u;
  return {ptx::prmt(0x040d0c00u, 0x0009080eu, index), ptx::prmt(0x10321000u, 0x00321054u, index),
          ptx::prmt(0x32767600u, 0x00545476u, index)};
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Two elements.
template <class T>
using Pair24 = std::conditional_t<sizeof(T) == 2, uint32_t, uint2>;

// A 4 x 4 tile of elements of 16 bits, two columns a register.
template <class T>
struct Tile16 {
  uint32_t left[4], right[4];  // [row]: columns 0 and 1; 2 and 3

  __device__ void set_row(int row, uint2 four) {
    left[row] = four.x;
    right[row] = four.y;
  }
  // The bits of an element as fp32.
  __device__ int bits(int row, int column) const {
    const uint32_t pair = column < 2 ? left[row] : right[row];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return int(column % 2 ? pair & 0xffff0000u : pair << 16);
    return __float_as_int(__half2float(__ushort_as_half(uint16_t(column % 2 ? pair >> 16 : pair))));
  }
  // What magnitude24 makes of an element.
  __device__ void magnitudes(float (&magnitude)[4][4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; c += 2) {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // two at a time; the minimum of NaN and a number is that
          const uint32_t bits = magnitudes(c ? right[r] : left[r]);
          magnitude[r][c] = __uint_as_float(bits << 16);
          magnitude[r][c + 1] = __uint_as_float(bits & 0xffff0000u);
        } else {
          magnitude[r][c] = __int_as_float(magnitude24(this->bits(r, c)));
          magnitude[r][c + 1] = __int_as_float(magnitude24(this->bits(r, c + 1)));
        }
      }
  }
  __device__ Tile16 transposed() const {
    Tile16 t;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t (&from)[4] = c < 2 ? left : right;
      const uint32_t selector = c % 2 ? 0x7632 : 0x5410;
      t.left[c] = ptx::prmt(from[0], from[1], selector);
      t.right[c] = ptx::prmt(from[2], from[3], selector);
    }
    return t;
  }
  // The same of registers of which only the tops of their halves count.
  __device__ Tile16 transposed_tops() const {
    Tile16 t;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t (&from)[4] = c < 2 ? left : right;
      const uint32_t selector = c % 2 ? 0x7733 : 0x5511;
      t.left[c] = ptx::prmt(from[0], from[1], selector);
      t.right[c] = ptx::prmt(from[2], from[3], selector);
    }
    return t;
  }
  // What rank24 makes of two elements, up to a monotone map: every NaN becomes 0x7fff.
  __device__ static uint32_t ranks(uint32_t pair) {
    using Two = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    const Two a = __hmax2_nan(__habs2(reinterpret_cast<const Two&>(pair)), Two(T(0.0f), T(0.0f)));
    return reinterpret_cast<const uint32_t&>(a);
  }
  // Zeros where `word` has a 0 at bit 4 row + column.
  __device__ void keep(uint32_t word) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      left[r] &= lanes(word >> (4 * r));
      right[r] &= lanes(word >> (4 * r + 2));
    }
  }
  // max(x, 0)^2, rounded to T; NaN stays NaN.
  __device__ void relu2() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      left[r] = square(r, 0) | square(r, 1) << 16;
      right[r] = square(r, 2) | square(r, 3) << 16;
    }
  }
  // The two elements of a row that its slots name.
  __device__ uint32_t pick(int row, const Slots24& slots) const {
    return ptx::prmt(left[row], right[row], ptx::prmt(slots.first, slots.second, uint32_t(row | (row + 4) << 4)));
  }

 private:
  __device__ static uint32_t magnitudes(uint32_t pair) {
    const uint32_t most = 0x7d807d80u;  // 2^124
    const __nv_bfloat162 a =
        __hmin2(__habs2(reinterpret_cast<const __nv_bfloat162&>(pair)), reinterpret_cast<const __nv_bfloat162&>(most));
    return reinterpret_cast<const uint32_t&>(a);
  }
  __device__ uint32_t square(int row, int column) const {
    const float x = __int_as_float(bits(row, column));
    const T y = narrow<T>(x < 0 ? 0.0f : x * x);  // the product is exact
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __bfloat16_as_ushort(y);
    else
      return __half_as_ushort(y);
  }
  // Bits 0 and 1 as two masks of 16 bits.
  __device__ static uint32_t lanes(uint32_t bits) { return ptx::prmt((bits & 3) * 0x40008000u, 0, 0xbb99); }
};

// The same of elements of 32 bits.
struct Tile32 {
  uint32_t at[4][4];

  __device__ void set_row(int row, uint4 four) {
    at[row][0] = four.x;
    at[row][1] = four.y;
    at[row][2] = four.z;
    at[row][3] = four.w;
  }
  __device__ int bits(int row, int column) const { return int(at[row][column]); }
  __device__ void magnitudes(float (&magnitude)[4][4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) magnitude[r][c] = __int_as_float(magnitude24(bits(r, c)));
  }
  __device__ Tile32 transposed() const {
    Tile32 t;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) t.at[c][r] = at[r][c];
    return t;
  }
  __device__ void keep(uint32_t word) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) at[r][c] = word >> (4 * r + c) & 1 ? at[r][c] : 0;
  }
  __device__ void relu2() {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float v = __uint_as_float(at[r][c]);
        at[r][c] = __float_as_uint(v < 0 ? 0.0f : v * v);
      }
  }
  __device__ uint2 pick(int row, const Slots24& slots) const {
    const uint32_t code = slots.code >> (8 * row);
    const uint32_t first = code & 2 ? at[row][2] : code & 1 ? at[row][1] : at[row][0];
    const uint32_t second = code & 8 ? (code & 4 ? at[row][3] : at[row][2]) : at[row][1];
    return {first, second};
  }
};

template <class T>
using Tile = std::conditional_t<sizeof(T) == 2, Tile16<T>, Tile32>;

// Four elements of a row, as Tile::set_row takes them.
template <class T>
using Four24 = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

// ---- pruning --------------------------------------------------------------------------------------------------------

// By rows, of elements of 16 bits: by_rows24 and again_by_columns24 for two rows or columns at once, one in each half
// of a register. Halves hold 15 bits of rank, so that (a | 0x8000) - b has its top bit set where a >= b, and no half
// borrows of the other.
constexpr uint32_t kTops = 0x80008000u;

// Tops set for those of four that less than two others beat; ij: i is not beaten by j.
__device__ inline void two_of_four(uint32_t d01, uint32_t d02, uint32_t d03, uint32_t d12, uint32_t d13, uint32_t d23,
                                   uint32_t (&kept)[4]) {
  kept[0] = majority24(d01, d02, d03);
  kept[1] = majority24(~d01, d12, d13);
  kept[2] = majority24(~d02, ~d12, d23);
  kept[3] = majority24(~d03, ~d13, ~d23);
}
// The tops of four registers as four bits in either half.
__device__ inline uint32_t nibbles(const uint32_t (&kept)[4]) {
  return (kept[0] >> 15 & 0x00010001u) | (kept[1] >> 14 & 0x00020002u) | (kept[2] >> 13 & 0x00040004u) |
         (kept[3] >> 12 & 0x00080008u);
}
// Of two registers' nibbles, a word: those of the first register come first.
__device__ inline int word_of(uint32_t first, uint32_t second) {
  const uint32_t both = first | second << 8;
  return int((both | both >> 12) & 0xffffu);
}

template <class T>
__device__ Tile24 prune_rows(const Tile16<T>& score) {
  Tile16<T> rank;  // rank[row]: columns in halves; and by_column[column]: rows in halves
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    rank.left[r] = Tile16<T>::ranks(score.left[r]);
    rank.right[r] = Tile16<T>::ranks(score.right[r]);
  }
  const Tile16<T> by_column = rank.transposed();
  Tile16<T> kept_columns;
  uint32_t found[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t (&x)[4] = half ? by_column.right : by_column.left;
    const auto holds = [&](int i, int j) { return (x[i] | kTops) - x[j]; };
    two_of_four(holds(0, 1), holds(0, 2), holds(0, 3), holds(1, 2), holds(1, 3), holds(2, 3),
                half ? kept_columns.right : kept_columns.left);
    found[half] = nibbles(half ? kept_columns.right : kept_columns.left);
  }
  const int word = word_of(found[0], found[1]);

  // Again, by columns: what is kept beats what is not; of two that are not, the first.
  const Tile16<T> kept = kept_columns.transposed_tops();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t (&x)[4] = half ? rank.right : rank.left;
    const uint32_t (&k)[4] = half ? kept.right : kept.left;
    const auto holds = [&](int i, int j) { return ~k[j] | (k[i] & ((x[i] | kTops) - x[j])); };
    uint32_t slots[4];
    two_of_four(holds(0, 1), holds(0, 2), holds(0, 3), holds(1, 2), holds(1, 3), holds(2, 3), slots);
    found[half] = nibbles(slots);
  }
  return {word, word, word_of(found[0], found[1])};
}

// What a tile keeps, and the slots of its packs, as in Tile24.
template <bool kTransposable, class AnyTile>
__device__ Tile24 prune_tile(const AnyTile& score) {
  if constexpr (kTransposable) {
    float magnitude[4][4];
    score.magnitudes(magnitude);
    const int word = best24<int>(magnitude);
    return {word, word, transpose24(word)};
  } else if constexpr (sizeof(AnyTile) < sizeof(Tile32)) {
    return prune_rows(score);
  } else {
    int rank[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) rank[r][c] = rank24(score.bits(r, c));
    const int word = by_rows24<int>(rank);
    return {word, word, again_by_columns24(word, rank)};
  }
}

}  // namespace slk::cuda
