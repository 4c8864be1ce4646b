// Pruning to 2:4 and packing both ways. Contract: slkernels/semi24_pack.h; the arithmetic: slkernels/semi24.cuh.
//
// kLanes tiles at a time, one a lane, whose 16 elements are 16 vectors. Packing works on blocks of kLanes x kLanes
// tiles, so that W_t's pack leaves by in-register transposes in runs of 2 kLanes values; the blocks that the matrix'
// edge cuts are done tile by tile with the scalar instances of the same arithmetic. Memory bounds it: W is read once,
// 1.06 (fp32) to 1.13 (16 bits) times its size is written.
#include "slkernels/semi24.cuh"

#include "cpu/simd_pairs.h"
#include "cpu/types.h"
#include "slkernels/semi24_pack.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr int kSide = 4 * kLanes;  // rows and columns of a block
// Columns over which all rows are packed before the next ones: their rows of W_t, a page each, stay in the TLB.
constexpr int64_t kPanelColumns = 512;
static_assert(kPanelColumns % kSide == 0, "panels of whole blocks");
static_assert(kTileRows24 % kLanes == 0, "threads share no block");

// ---- elements -------------------------------------------------------------------------------------------------------
// An element's bits are an int32, 16-bit types zero-extended (fp64: int64); K is that, or a vector of it.

template <class T>
struct Bits {
  using K = int32_t;
  using F = float;
};
template <>
struct Bits<double> {
  using K = int64_t;
  using F = double;
};

SLK_INLINE int32_t bits_of(bf16 x) {
  return x.bits;
}
SLK_INLINE int32_t bits_of(f16 x) {
  return x.bits;
}
SLK_INLINE int32_t bits_of(float x) {
  return int32_t(to_bits(x));
}
SLK_INLINE int64_t bits_of(double x) {
  int64_t u;
  std::memcpy(&u, &x, 8);
  return u;
}
SLK_INLINE float as_float(int32_t bits) {
  return from_bits(uint32_t(bits));
}
SLK_INLINE double as_float(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
SLK_INLINE V as_float(VI bits) {
  return (V)bits;
}

template <class T, class K>
SLK_INLINE K rank(K bits) {
  if constexpr (sizeof(T) == 2) {
    const K a = bits & 0x7fff, nan = K{} + (std::is_same_v<T, bf16> ? 0x7f81 : 0x7c01);
    return a < nan ? a : nan;
  } else {
    return rank24(bits);
  }
}
template <class T, class K>
SLK_INLINE auto magnitude(K bits) {
  if constexpr (std::is_same_v<T, f16>) {
    const K a = bits & 0x7fff;
    const auto scaled = as_float(a << 13) * 0x1p112f;  // exact, subnormals included
    const auto most = as_float(K{} + 0x7d800000);
    return a < 0x7c00 ? scaled : most;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return as_float(magnitude24<K>(bits << 16));
  } else {
    return as_float(magnitude24(bits));
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class K>
struct Words {
  K rows;     // bit 4 r + c: kept
  K columns;  // bit 4 c + r: slots of the transposed pack
};

template <class T, Prune24 kBy, class W, class K>
SLK_INLINE Words<W> prune_tile(const K (&score)[4][4]) {
  if constexpr (kBy == Prune24::transposable) {
    decltype(magnitude<T>(score[0][0])) w[4][4];
    for (int i = 0; i < 16; ++i) w[i / 4][i % 4] = magnitude<T>(score[i / 4][i % 4]);
    const W word = best24<W>(w);
    return {word, transpose24(word)};
  } else {
    K w[4][4];
    for (int i = 0; i < 16; ++i) w[i / 4][i % 4] = rank<T>(score[i / 4][i % 4]);
    const W word = by_rows24<W>(w);
    return {word, again_by_columns24(word, w)};
  }
}

// The bits of a tile of height x width elements at p, zeros beyond.
template <class T, class K>
SLK_INLINE void load_tile(const T* p, int64_t ld, int height, int width, K (&tile)[4][4]) {
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) tile[r][c] = r < height && c < width ? bits_of(p[r * ld + c]) : 0;
}

// kLanes tiles side by side: tile[r][c] has theirs of row r, column c.
SLK_INLINE void load_row(const float* p, VI (&row)[4]) {
  const Pair a = split(load(p), load(p + kLanes)), b = split(load(p + 2 * kLanes), load(p + 3 * kLanes));
  const Pair even = split(a.even, b.even), odd = split(a.odd, b.odd);
  row[0] = (VI)even.even;
  row[1] = (VI)odd.even;
  row[2] = (VI)even.odd;
  row[3] = (VI)odd.odd;
}
template <class Half>
SLK_INLINE void load_row(const Half* p, VI (&row)[4]) {
  const float* words = reinterpret_cast<const float*>(p);  // two elements each; loaded as bytes
  const Pair x = split(load(words), load(words + kLanes));
  row[0] = (VI)x.even & 0xffff;
  row[1] = (VI)((VU)x.even >> 16);
  row[2] = (VI)x.odd & 0xffff;
  row[3] = (VI)((VU)x.odd >> 16);
}
template <class T>
SLK_INLINE void load_tiles(const T* p, int64_t ld, VI (&tile)[4][4]) {
  for (int r = 0; r < 4; ++r) load_row(p + r * ld, tile[r]);
}

// ---- masks ----------------------------------------------------------------------------------------------------------

alignas(64) constexpr int32_t kBools[16] = {0,         0x1,       0x100,     0x101,     0x10000,   0x10001,
                                            0x10100,   0x10101,   0x1000000, 0x1000001, 0x1000100, 0x1000101,
                                            0x1010000, 0x1010001, 0x1010100, 0x1010101};

template <class T, Prune24 kBy>
void prune_tiles(const T* score, int64_t n, int64_t m, int64_t i, uint8_t* mask) {
  int64_t j = 0;
  if constexpr (!std::is_same_v<T, double>) {
    for (; i + 4 <= n && j + kSide <= m; j += kSide) {
      VI tile[4][4];
      load_tiles(score + i * m + j, m, tile);
      const VI word = prune_tile<T, kBy, VI>(tile).rows;
      for (int r = 0; r < 4; ++r) {
        const VI bools = lookup(kBools, word >> 4 * r & 15);
        std::memcpy(mask + (i + r) * m + j, &bools, kSide);
      }
    }
  }
  for (; j < m; j += 4) {
    const int height = int(n - i < 4 ? n - i : 4), width = int(m - j < 4 ? m - j : 4);
    typename Bits<T>::K tile[4][4];
    load_tile(score + i * m + j, m, height, width, tile);
    const int32_t word = prune_tile<T, kBy, int32_t>(tile).rows;
    for (int r = 0; r < height; ++r)
      for (int c = 0; c < width; ++c) mask[(i + r) * m + j + c] = word >> (4 * r + c) & 1;
  }
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// What a block packs: two values a group, and the plain format's metadata.
template <class T>
struct Side {
  T* values;
  int64_t ld;
  alignas(64) uint8_t meta[kSide][kLanes / 2];
};
template <class T>
struct Block {
  Side<T> rows, columns;  // of W and of W_t
};

alignas(64) constexpr int32_t kCodes[16] = {0, 0, 0, 0x4, 0, 0x8, 0x9, 0, 0, 0xC, 0xD, 0, 0xE, 0, 0, 0};

// Kept values to their places: first[t], second[t], t ascending.
SLK_INLINE void store_pairs(float* p, VI first, VI second) {
  store_pair(p, {(V)first, (V)second});
}
template <class Half>
SLK_INLINE void store_pairs(Half* p, VI first, VI second) {
  const VI pairs = first | second << 16;
  std::memcpy(p, &pairs, sizeof pairs);
}
SLK_INLINE void put_nibble(uint8_t* bytes, int at, int code) {
  const int shift = 4 * (at % 2);
  bytes[at / 2] = uint8_t((bytes[at / 2] & ~(15 << shift)) | code << shift);
}

// Brings `bytes` bytes from p to the second-level cache.
SLK_INLINE void prefetch(const void* p, int bytes) {
  for (int b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 0, 2);
}

template <class T, Prune24 kBy>
void pack_block(const T* w, const T* score, int64_t ld, Block<T>& block) {
  constexpr bool kHalf = sizeof(T) == 2;
  VI first_t[4][kLanes], second_t[4][kLanes];  // [column of the tile][tile row]; 16-bit pairs in first_t
  alignas(64) uint8_t codes_t[kLanes][kSide];
  for (int i = 0; i < kLanes; ++i) {
    // The next block's: its rows are too far apart for the hardware to see them coming.
    for (int r = 4 * i; r < 4 * i + 4; ++r) {
      prefetch(w + r * ld + kSide, kSide * sizeof(T));
      prefetch(block.rows.values + r * block.rows.ld + kSide / 2, kSide / 2 * sizeof(T));
      prefetch(block.columns.values + (kSide + r) * block.columns.ld, kSide / 2 * sizeof(T));
    }
    VI tile[4][4];
    load_tiles(score + 4 * i * ld, ld, tile);
    const Words<VI> kept = prune_tile<T, kBy, VI>(tile);
    if (score != w) load_tiles(w + 4 * i * ld, ld, tile);
    const auto in = [&](VI word, int bit) __attribute__((always_inline)) { return (word & 1 << bit) != 0; };
    VI codes = {};
    for (int r = 0; r < 4; ++r) {
      const VI(&x)[4] = tile[r];
      const VI first = in(kept.rows, 4 * r) ? x[0] : in(kept.rows, 4 * r + 1) ? x[1] : x[2];
      const VI second = in(kept.rows, 4 * r + 3) ? x[3] : in(kept.rows, 4 * r + 2) ? x[2] : x[1];
      store_pairs(block.rows.values + (4 * i + r) * block.rows.ld, first, second);
      store_nibbles(block.rows.meta[4 * i + r], lookup(kCodes, kept.rows >> 4 * r & 15));
    }
    if constexpr (kBy == Prune24::rows)  // a slot of W_t that W's mask does not keep is a zero
      for (int e = 0; e < 16; ++e) tile[e / 4][e % 4] = in(kept.rows, e) ? tile[e / 4][e % 4] : VI{};
    for (int c = 0; c < 4; ++c) {
      const VI x[4] = {tile[0][c], tile[1][c], tile[2][c], tile[3][c]};
      const VI first = in(kept.columns, 4 * c) ? x[0] : in(kept.columns, 4 * c + 1) ? x[1] : x[2];
      const VI second = in(kept.columns, 4 * c + 3) ? x[3] : in(kept.columns, 4 * c + 2) ? x[2] : x[1];
      first_t[c][i] = kHalf ? first | second << 16 : first;
      if constexpr (!kHalf) second_t[c][i] = second;
      codes |= lookup(kCodes, kept.columns >> 4 * c & 15) << 8 * c;
    }
    std::memcpy(codes_t[i], &codes, kSide);
  }
  for (int c = 0; c < 4; ++c) {
    V first[kLanes], second[kLanes];
    for (int i = 0; i < kLanes; ++i) first[i] = (V)first_t[c][i];
    transpose(first);
    if constexpr (!kHalf) {
      for (int i = 0; i < kLanes; ++i) second[i] = (V)second_t[c][i];
      transpose(second);
    }
    for (int i = 0; i < kLanes; ++i) {
      T* out = block.columns.values + (4 * i + c) * block.columns.ld;
      if constexpr (kHalf)
        std::memcpy(out, &first[i], sizeof(V));
      else
        store_pair(out, {first[i], second[i]});
    }
  }
  for (int j = 0; j < kSide; ++j)
    for (int b = 0; b < kLanes / 2; ++b)
      block.columns.meta[j][b] = uint8_t(codes_t[2 * b][j] | codes_t[2 * b + 1][j] << 4);
}

// The same tile by tile, of a block of height x width elements, or of any type.
template <class T, Prune24 kBy>
void pack_edge(const T* w, const T* score, int64_t ld, int height, int width, Block<T>& block) {
  using K = typename Bits<T>::K;
  std::memset(block.rows.meta, 0x44, sizeof block.rows.meta);
  std::memset(block.columns.meta, 0x44, sizeof block.columns.meta);
  const auto element = [&](int row, int column) { return row < height && column < width ? w[row * ld + column] : T{}; };
  for (int i = 0; i < height; i += 4)
    for (int j = 0; j < width; j += 4) {
      const int tile_height = height - i < 4 ? height - i : 4, tile_width = width - j < 4 ? width - j : 4;
      K bits[4][4];
      load_tile(score + i * ld + j, ld, tile_height, tile_width, bits);
      const Words<int32_t> words = prune_tile<T, kBy, int32_t>(bits);
      const Tile24 tile = at_edge24(words.rows, words.columns, tile_width, tile_height);
      for (int r = 0; r < tile_height; ++r) {
        const int code = code24(tile.rows >> 4 * r & 15);
        T* out = block.rows.values + (i + r) * block.rows.ld + j / 2;
        out[0] = element(i + r, j + (code & 3));
        out[1] = element(i + r, j + (code >> 2));
        put_nibble(block.rows.meta[i + r], j / 4, code);
      }
      for (int c = 0; c < tile_width; ++c) {
        const int code = code24(tile.columns >> 4 * c & 15);
        const auto kept = [&](int r) { return tile.word >> (4 * r + c) & 1 ? element(i + r, j + c) : T{}; };
        T* out = block.columns.values + (j + c) * block.columns.ld + i / 2;
        out[0] = kept(code & 3);
        out[1] = kept(code >> 2);
        put_nibble(block.columns.meta[j + c], i / 4, code);
      }
    }
}

// The first `columns` columns of `count` rows of a block's metadata, to the rows from `row` and the columns from
// `column` of the pack.
void put_meta(const Packed24& pack, const uint8_t (&meta)[kSide][kLanes / 2], int64_t row, int count, int64_t column,
              int columns) {
  if (pack.layout == Layout24::plain) {
    const int64_t bytes = ceil_div(pack.m, 8);
    uint8_t* out = static_cast<uint8_t*>(pack.meta) + row * bytes + column / 8;
    if (columns == kSide)
      for (int i = 0; i < count; ++i) std::memcpy(out + i * bytes, meta[i], kLanes / 2);
    else
      for (int i = 0; i < count; ++i) std::memcpy(out + i * bytes, meta[i], (columns + 7) / 8);
    return;
  }
  int64_t at[kSide / 16];
  const int words = (columns + 15) / 16;
  for (int word = 0; word < words; ++word) at[word] = packed_column24(pack.layout, column / 16 + word, pack.rows());
  for (int i = 0; i < count; ++i) {
    uint16_t* out = static_cast<uint16_t*>(pack.meta) + packed_row24(pack.layout, row + i);
    for (int word = 0; word < words; ++word) std::memcpy(out + at[word], meta[i] + 2 * word, 2);
  }
}

template <class T, Prune24 kBy>
void pack_tiles(const T* w, const T* score, Range tiles, const Packed24& pack, const Packed24& pack_t) {
  const int64_t n = pack.n, m = pack.m;
  Block<T> block;
  block.rows.ld = pack.row_values();
  block.columns.ld = pack_t.row_values();
  const int64_t end = n < 4 * tiles.end ? n : 4 * tiles.end;
  for (int64_t panel = 0; panel < m; panel += kPanelColumns)
    for (int64_t i = 4 * tiles.begin; i < end; i += kSide)
      for (int64_t j = panel; j < m && j < panel + kPanelColumns; j += kSide) {
        const int64_t at = i * m + j;
        const int height = int(n - i < kSide ? n - i : kSide), width = int(m - j < kSide ? m - j : kSide);
        block.rows.values = static_cast<T*>(pack.values) + i * block.rows.ld + j / 2;
        block.columns.values = static_cast<T*>(pack_t.values) + j * block.columns.ld + i / 2;
        if constexpr (std::is_same_v<T, double>) {
          pack_edge<T, kBy>(w + at, score + at, m, height, width, block);
        } else {
          if (height == kSide && width == kSide)
            pack_block<T, kBy>(w + at, score + at, m, block);
          else
            pack_edge<T, kBy>(w + at, score + at, m, height, width, block);
        }
        put_meta(pack, block.rows.meta, i, height, j, width);
        put_meta(pack_t, block.columns.meta, j, width, i, height);
      }
}

// ---- the table ------------------------------------------------------------------------------------------------------

void prune(DType dtype, const void* score, int64_t n, int64_t m, Prune24 by, Range tiles, uint8_t* mask) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* from = static_cast<const T*>(score);
    for (int64_t i = 4 * tiles.begin; i < n && i < 4 * tiles.end; i += 4)
      if (by == Prune24::rows)
        prune_tiles<T, Prune24::rows>(from, n, m, i, mask);
      else
        prune_tiles<T, Prune24::transposable>(from, n, m, i, mask);
  });
}

void prune_compress(DType dtype, const void* w, const void* score, Prune24 by, Range tiles, const Packed24& pack,
                    const Packed24& pack_t) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T *from = static_cast<const T*>(w), *rank_by = static_cast<const T*>(score);
    if (by == Prune24::rows)
      pack_tiles<T, Prune24::rows>(from, rank_by, tiles, pack, pack_t);
    else
      pack_tiles<T, Prune24::transposable>(from, rank_by, tiles, pack, pack_t);
  });
}

}  // namespace

extern const Pack24Kernels pack24_table;
const Pack24Kernels pack24_table = {prune, prune_compress};

}  // namespace slk::cpu::SLK_ISA
