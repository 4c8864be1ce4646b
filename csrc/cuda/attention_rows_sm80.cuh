// A tile of queries and the keys that its row of the mask lists, for sm_80 and newer: which tile of keys comes when,
// and what of its scores is kept. Of the forward and of dq.
#pragma once

#include <new>

#include "cuda/attention_sm80.cuh"

namespace slk::cuda {

// The tiles of keys of a row: those of its entries, kKeys at a time, then its single columns, kKeys at a time.
template <int kKeys>
struct KeyTiles {
  int sk, begin, parts_log2, partial, listed, columns_begin, columns_end, count;

  __device__ KeyTiles(const BlockRows& m, int64_t row, int64_t keys) : sk(int(keys)) {
    const Entries entries(m.rows, row);
    parts_log2 = m.block_n == kKeys ? 0 : m.block_n == 2 * kKeys ? 1 : 2;
    begin = entries.begin;
    partial = (entries.full - begin) << parts_log2;
    listed = (entries.end - begin) << parts_log2;
    columns_begin = columns_end = 0;
    if (m.col_ptr) {
      const int64_t from = m.col_ptr[row], to = m.col_ptr[row + 1];
      if (from >= 0 && to <= m.columns && from < to) {
        columns_begin = int(from);
        columns_end = int(to);
      }
    }
    count = listed + (columns_end - columns_begin + kKeys - 1) / kKeys;
  }
  __device__ int entry(int tile) const { return begin + (tile >> parts_log2); }
  __device__ int part(int tile) const { return tile & ((1 << parts_log2) - 1); }
  // The first key of a listed tile, sk where there is none; of a tile of columns, its place in col_idx.
  __device__ int start(const BlockRows& m, int tile) const {
    if (tile >= count) return sk;
    if (tile >= listed) return columns_begin + (tile - listed) * kKeys;
    const int first = first_key(m.rows.idx[entry(tile)], m.unit, sk);
    return first < sk ? min(first + part(tile) * kKeys, sk) : sk;
  }
  // The key of column `at` of a tile; negative: none.
  __device__ int key(const BlockRows& m, int tile, int start, int at) const {
    const int place = start + at;
    if (tile < listed) return place < sk ? place : -1;
    if (place >= columns_end) return -1;
    const int column = m.col_idx[place];
    return column < sk ? column : -1;
  }
  __device__ bool masked(int tile, int start) const { return tile < partial || tile >= listed || start > sk - kKeys; }
};

// What a block works on. It lies in shared memory and is read from there again wherever it is needed: in registers, it
// would stand beside the sums all the time.
template <int kKeys>
struct RowTask {
  TileRows rows;
  KeyTiles<kKeys> tiles;
  __device__ RowTask(const AttentionForward& f, const Stripes& stripes, int64_t tile)
      : rows(f.shape, f.mask, stripes, tile),
        tiles(f.mask, list_row(f.mask, f.mask.rows.blocks, rows.b, rows.mask_head, rows.block), f.shape.sk) {}
};

// s = -inf where the tile drops (row, key). A thread holds rows lane / 4 + 8 half of each 16, columns 8 n + 2 (lane %
// 4) and the next. What a row keeps is a bit a key, 32 keys a word: shifted by the lane's own 2 (lane % 4), the bits
// that the thread looks at are constants.
template <int kMT, int kKeys>
__device__ void mask_scores(float (&s)[kMT][kKeys / 8][4], const BlockRows& m, const KeyTiles<kKeys>& tiles,
                            const TileRows& rows, int tile, int start, int row) {
  const int lane = threadIdx.x % 32;
  const bool partial = tile < tiles.partial;
  const EntryBits bits(m, partial ? m.rows.bit_id : nullptr, partial ? tiles.entry(tile) : 0);
  const int in_entry = partial ? tiles.part(tile) * kKeys : 0;
#pragma unroll
  for (int w = 0; w < kKeys / 32; ++w) {
    const uint32_t there = __ballot_sync(0xffffffffu, tiles.key(m, tile, start, 32 * w + lane) >= 0 && !bits.skip);
#pragma unroll
    for (int i = 0; i < kMT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * i + 8 * half + lane / 4, query = rows.query_of(r);
        uint32_t keep = there;
        if (partial && rows.holds(r)) {
          keep &= Bounds(m, rows.b, rows.mask_head, query).word(start + 32 * w, m.sink);
          if (bits.words)
            keep &= bits.words[(query - rows.block * int(m.block_m)) * int(m.block_n / 32) + in_entry / 32 + w];
        }
        keep >>= 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!(keep & 1u << (8 * n + e))) s[i][4 * w + n][2 * half + e] = -SLK_INFINITY;
      }
  }
}

}  // namespace slk::cuda
