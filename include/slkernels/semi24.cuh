// Family `semi24`: the arithmetic of pruning and packing that all devices share, so that they agree bit for bit.
//
// A function template takes scalars (a CUDA thread, the edges on a CPU) or vectors with one group or tile a lane (the
// SIMD kernels): K is int32, int64 or a vector of int32; F is float, double or a vector of float; W is int32 or a
// vector of int32. A tile's kept elements are a word: bit 4 r + c is row r, column c.
#pragma once

#include <type_traits>

#include "slkernels/semi24.h"

namespace slk {
SLK_PER_ISA {
#define SLK_SEMI24 SLK_HD inline __attribute__((always_inline))

  // ---- where metadata lie
  // ---------------------------------------------------------------------------------------------

  // Both packed layouts permute the plain format's words of four groups (16 bits, first group lowest). The offset of a
  // word, in words, is a sum of one part for its row and one for its place in the row; `rows` is the padded row count.

  // CUTLASS 2.x' reorder_meta interleaves the rows r, r + 8, r + 16, r + 24 of 32, then transposes 2 x 2 blocks of
  // words.
  SLK_SEMI24 constexpr int64_t sm80_row24(int64_t row) {
    const int64_t i = row / 32 * 32 + row % 8 * 4 + row % 32 / 8;
    return 2 * i - i % 2;
  }
  SLK_SEMI24 constexpr int64_t sm80_column24(int64_t word, int64_t rows) {
    return word / 2 * 2 * rows + 2 * (word % 2);
  }
  // CUTLASS 3.x' atoms of 64 rows x kSm90TileK columns, down a column of atoms first. In an atom, fastest first: row
  // bit 3, column bits 5 and up, row bits 0-2, column bit 4, row bits 4-5. (Column bits 0-3 are within the word.)
  constexpr int64_t kSm90Words = kSm90TileK / 16;  // a row of an atom
  SLK_SEMI24 constexpr int64_t sm90_row24(int64_t row) {
    return row / 64 * 64 * kSm90Words + row / 8 % 2 + kSm90Words * (row % 8 + 16 * (row / 16 % 4));
  }
  SLK_SEMI24 constexpr int64_t sm90_column24(int64_t word, int64_t rows) {
    const int64_t w = word % kSm90Words;
    return word / kSm90Words * kSm90Words * rows + 2 * (w / 2) + 8 * kSm90Words * (w % 2);
  }

  SLK_SEMI24 constexpr int64_t packed_row24(Layout24 layout, int64_t row) {
    return layout == Layout24::sm80 ? sm80_row24(row) : sm90_row24(row);
  }
  SLK_SEMI24 constexpr int64_t packed_column24(Layout24 layout, int64_t word, int64_t rows) {
    return layout == Layout24::sm80 ? sm80_column24(word, rows) : sm90_column24(word, rows);
  }
  SLK_SEMI24 constexpr int64_t packed_word24(Layout24 layout, int64_t row, int64_t word, int64_t rows) {
    return packed_row24(layout, row) + packed_column24(layout, word, rows);
  }
  SLK_SEMI24 constexpr int64_t sm80_word24(int64_t row, int64_t word, int64_t rows) {
    return packed_word24(Layout24::sm80, row, word, rows);
  }
  SLK_SEMI24 constexpr int64_t sm90_word24(int64_t row, int64_t word, int64_t rows) {
    return packed_word24(Layout24::sm90, row, word, rows);
  }

  // ---- codes
  // ----------------------------------------------------------------------------------------------------------

  // Code of a group of which the bits of `kept` are kept, two of four; and back.
  SLK_SEMI24 constexpr int code24(int kept) {
    return int(0x000E0DC009804000ull >> 4 * kept & 15);
  }
  SLK_SEMI24 constexpr int kept24_of(int code) {
    return 1 << (code & 3) | 1 << (code >> 2);
  }

  // Two slots of a group that keeps the bits of `kept`, at most two, of its first `width` columns: the columns kept,
  // then padding, then columns not kept, each from the lowest.
  SLK_SEMI24 constexpr int fill24(int kept, int width) {
    const int padding = 15 & ~((1 << width) - 1);
    for (int i = 0; i < 2; ++i) {
      const bool full = (kept & (kept - 1)) != 0;
      const int wanted = padding & ~kept ? padding & ~kept : 15 & ~kept;
      kept |= full ? 0 : wanted & -wanted;
    }
    return kept;
  }

  // Bit 4 r + c of a tile's word to bit 4 c + r.
  template <class W>
  SLK_SEMI24 W transpose24(W word) {
    const W a = (word ^ word >> 3) & 0x0a0a;
    word = word ^ a ^ a << 3;
    const W b = (word ^ word >> 6) & 0x00cc;
    return word ^ b ^ b << 6;
  }

  // ---- by rows: two of four by rank
  // -----------------------------------------------------------------------------------

  // Rank of |x| from the bits of x: its order, with every NaN equal and above infinity.
  template <class K>
  SLK_SEMI24 K rank24(K bits) {
    const K a = bits & 0x7fffffff, nan = K{} + 0x7f800001;
    return a < nan ? a : nan;
  }
  SLK_SEMI24 int64_t rank24(int64_t bits) {
    const int64_t a = bits & 0x7fffffffffffffff, nan = 0x7ff0000000000001;
    return a < nan ? a : nan;
  }

  template <class K>
  SLK_SEMI24 K majority24(K a, K b, K c) {
    return (a & b) | (c & (a | b));
  }

  // All bits of kept[i] set for the two largest of four keys (>= -2), the lower index among equals; else none.
  template <class K>
  SLK_SEMI24 void top2_of_4(const K(&key)[4], K(&kept)[4]) {
    constexpr int kSign = std::is_same_v<K, int64_t> ? 63 : 31;
    // The sign of ij: j > i in key, so that j beats i; otherwise i beats j.
    const K d01 = key[0] - key[1], d02 = key[0] - key[2], d03 = key[0] - key[3];
    const K d12 = key[1] - key[2], d13 = key[1] - key[3], d23 = key[2] - key[3];
    // Kept: not beaten by two.
    kept[0] = ~majority24(d01, d02, d03) >> kSign;
    kept[1] = ~majority24<K>(~d01, d12, d13) >> kSign;
    kept[2] = ~majority24<K>(~d02, ~d12, d23) >> kSign;
    kept[3] = majority24(d03, d13, d23) >> kSign;
  }

  // ---- transposable: the best of 90 patterns
  // --------------------------------------------------------------------------

  // |x| as it enters a pattern's sum, from the bits of x: NaN and what is larger than 2^124 (fp64: 2^1020) count as
  // that, so that sums are finite and a tile keeps as many of them as it can.
  template <class K>
  SLK_SEMI24 K magnitude24(K bits) {
    const K a = bits & 0x7fffffff, most = K{} + 0x7d800000;
    return a < most ? a : most;
  }
  SLK_SEMI24 int64_t magnitude24(int64_t bits) {
    const int64_t a = bits & 0x7fffffffffffffff, most = 0x7fb0000000000000;
    return a < most ? a : most;
  }

  template <class F, class W>
  struct Choice24 {
    F sum;
    W word;
    SLK_SEMI24 Choice24 operator+(const Choice24& b) const { return {sum + b.sum, word | b.word}; }
    // The larger sum; *this among equals.
    SLK_SEMI24 Choice24 or_else(const Choice24& b) const {
      const auto better = b.sum > sum;
      return {better ? b.sum : sum, better ? b.word : word};
    }
  };

  // Columns shared out between u and v, two rows (or two sums of two rows) of a tile, with the word bits of their
  // column 0.
  template <class F, class W>
  struct Split24 {
    const F (&u)[4], (&v)[4];
    int u_bits, v_bits;

    // u keeps x, v keeps y.
    SLK_SEMI24 Choice24<F, W> cross(int x, int y) const { return {u[x] + v[y], W{} + (u_bits << x | v_bits << y)}; }
    // Each keeps one of the columns x < y.
    SLK_SEMI24 Choice24<F, W> one_each(int x, int y) const { return cross(x, y).or_else(cross(y, x)); }
    // Each keeps two of four: one of the columns 0, 1 and one of 2, 3; or u the lower two; or u the upper two.
    SLK_SEMI24 Choice24<F, W> two_each() const {
      return (one_each(0, 1) + one_each(2, 3)).or_else(cross(0, 2) + cross(1, 3)).or_else(cross(2, 0) + cross(3, 1));
    }
  };

  // The word of the pattern with the largest sum among the 90 that keep two of every row and column of a 4 x 4 tile of
  // magnitudes.
  //
  // The tree of additions of a pattern, with S[c] = w[0][c] + w[1][c] and S'[c] = w[2][c] + w[3][c]. Rows 0 and 1 keep
  //   no common column (36 patterns):  the sum of rows 0, 1 + that of rows 2, 3; each the sum of two columns' pairs
  //   both (6):                        (S[a] + S'[b]) + (S[c] + S'[d])
  //   one, s (48):                     ((w[0][x] + w[1][y]) + (w[2][x] + w[3][y], or y and x)) + (S[s] + S'[z])
  // The largest sum wins, found as the sum of the largest parts, which rounding does not change, as it is monotone.
  // Among equal sums: the order of the three kinds; then of {x, y} (0 1, 0 2, 0 3, 1 2, 1 3, 2 3); then larger parts;
  // then the order in Split24. About 175 additions, comparisons and selections, where 90 sums of their own need 456.
  template <class W, class F>
  SLK_SEMI24 W best24(const F(&w)[4][4]) {
    F s[4], t[4];
    for (int c = 0; c < 4; ++c) {
      s[c] = w[0][c] + w[1][c];
      t[c] = w[2][c] + w[3][c];
    }
    const Split24<F, W> top{w[0], w[1], 0x1, 0x10}, bottom{w[2], w[3], 0x100, 0x1000}, both{s, t, 0x11, 0x1100};
    Choice24<F, W> best = (top.two_each() + bottom.two_each()).or_else(both.two_each());
    const auto one_common = [&](int x, int y, int s, int z) __attribute__((always_inline)) {
      best = best.or_else((top.one_each(x, y) + bottom.one_each(x, y)) + both.one_each(s, z));
    };
    one_common(0, 1, 2, 3);
    one_common(0, 2, 1, 3);
    one_common(0, 3, 1, 2);
    one_common(1, 2, 0, 3);
    one_common(1, 3, 0, 2);
    one_common(2, 3, 0, 1);
    return best.word;
  }

  // ---- tiles
  // ----------------------------------------------------------------------------------------------------------

  // The word of a tile pruned by rows; rank [4][4].
  template <class W, class K>
  SLK_SEMI24 W by_rows24(const K(&rank)[4][4]) {
    W word{};
    for (int r = 0; r < 4; ++r) {
      K kept[4];
      top2_of_4(rank[r], kept);
      for (int c = 0; c < 4; ++c) word |= W(kept[c]) & (1 << (4 * r + c));
    }
    return word;
  }

  // The slots of the transposed pack, bit 4 c + r: two of each column by rank, those first that `word` keeps.
  template <class W, class K>
  SLK_SEMI24 W again_by_columns24(W word, const K(&rank)[4][4]) {
    W slots{};
    for (int c = 0; c < 4; ++c) {
      K key[4], kept[4];
      for (int r = 0; r < 4; ++r) key[r] = rank[r][c] | ~-K(word >> (4 * r + c) & 1);  // -1 where not kept
      top2_of_4(key, kept);
      for (int r = 0; r < 4; ++r) slots |= W(kept[r]) & (1 << (4 * c + r));
    }
    return slots;
  }

  // What a tile at the matrix' edge, `width` columns by `height` rows of it inside, keeps and packs. The elements
  // outside are zeros, and of a row or column outside slots 0 and 1 are packed. Inside: rows == word, columns as given.
  struct Tile24 {
    int word;     // kept elements of the matrix, bit 4 r + c
    int rows;     // slots of W's pack, bit 4 r + c
    int columns;  // slots of W_t's pack, bit 4 c + r; an element that `word` does not keep is packed as zero
  };
  SLK_SEMI24 Tile24 at_edge24(int word, int columns, int width, int height) {
    Tile24 tile{0, 0, 0};
    for (int r = 0; r < height; ++r) tile.word |= word & ((1 << width) - 1) << 4 * r;
    const int kept = columns & transpose24(tile.word);
    for (int i = 0; i < 4; ++i) {
      tile.rows |= (i < height ? fill24(tile.word >> 4 * i & 15, width) : 3) << 4 * i;
      tile.columns |= (i < width ? fill24(kept >> 4 * i & 15, height) : 3) << 4 * i;
    }
    return tile;
  }

#undef SLK_SEMI24
}
}  // namespace slk
