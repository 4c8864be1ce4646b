// What the forward and the backward of block-sparse attention share: two products, packing, masks.
//
// One operand of every product stays for a whole block of queries (or of keys, in the pass for dk and dv): it is packed
// transposed into panels x[feature][kPanel] with a query (a key) in every lane. The other operand is streamed: its rows
// are read where they lie, an element broadcast at a time. So nothing is packed per tile, softmax needs no sum across
// lanes, any run of rows (ragged, unaligned, gathered) is a tile, and both products have one form each:
//
//   product_rows:  out[r][lane]  = factor * sum_d a[r][d] x[d][lane]      s = k q^T, dp = v do^T
//   product_sum:   total[d][lane] +=        sum_r a[r][d] x[r][lane]      o += v^T p, dq += k^T ds
//
// Per step a register tile of kTileRows x 2 vectors takes 2 vector loads and kTileRows broadcasts for 2 kTileRows FMAs:
// 10 loads for 16 FMAs on AVX-512, 8 for 12 with 16 registers. That is within two loads a cycle at two FMAs a cycle.
#pragma once

#include "cpu/math.h"
#include "cpu/types.h"
#include "slkernels/attention.h"

namespace slk::cpu::SLK_ISA {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 16 accumulators of 32 registers; a divisor of 64, 80, 96, 128, 192, 256
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#endif

constexpr int kTileKeys = 64;  // rows of a tile: with 128 a panel of 128 features, its logits and rows overflow L1

// Rows of a streamed operand, fp32.
struct Rows {
  const float* data;
  int64_t stride;
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
SLK_INLINE void fill(float* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}

template <int NR, int NV>
SLK_INLINE void product_rows_tile(Rows a, const float* x, int64_t depth, float factor, float* out) {
  V acc[NR][NV];
  for (int r = 0; r < NR; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int64_t d = 0; d < depth; ++d) {
    V xv[NV];
    for (int v = 0; v < NV; ++v) xv[v] = load(x + d * kPanel + v * kLanes);
    for (int r = 0; r < NR; ++r) {
      const V av = broadcast(a.data[r * a.stride + d]);
      for (int v = 0; v < NV; ++v) acc[r][v] += av * xv[v];
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * kPanel + v * kLanes, acc[r][v] * factor);
}

// The sum of a tile's rows starts from zero: a chain of kTileKeys additions, then one a tile.
template <int NR, int NV>
SLK_INLINE void product_sum_tile(Rows a, const float* x, int64_t rows, float* total) {
  V acc[NR][NV];
  for (int d = 0; d < NR; ++d)
    for (int v = 0; v < NV; ++v) acc[d][v] = zero();
  for (int64_t r = 0; r < rows; ++r) {
    V xv[NV];
    for (int v = 0; v < NV; ++v) xv[v] = load(x + r * kPanel + v * kLanes);
    for (int d = 0; d < NR; ++d) {
      const V av = broadcast(a.data[r * a.stride + d]);
      for (int v = 0; v < NV; ++v) acc[d][v] += av * xv[v];
    }
  }
  for (int d = 0; d < NR; ++d)
    for (int v = 0; v < NV; ++v) {
      float* at = total + d * kPanel + v * kLanes;
      store(at, load(at) + acc[d][v]);
    }
}

// Calls tile(width, first) for runs of kTileRows, then 4, 2 and 1, that cover [0, count).
template <class Tile>
SLK_INLINE void in_tiles(int64_t count, const Tile& tile) {
  int64_t i = 0;
  for (; i + kTileRows <= count; i += kTileRows) tile(std::integral_constant<int, kTileRows>(), i);
  if (i + 4 <= count) tile(std::integral_constant<int, 4>(), i), i += 4;
  if (i + 2 <= count) tile(std::integral_constant<int, 2>(), i), i += 2;
  if (i < count) tile(std::integral_constant<int, 1>(), i);
}

template <int NV>
void product_rows(Rows a, int64_t rows, const float* x, int64_t depth, float factor, float* out) {
  in_tiles(rows, [&](auto width, int64_t r) {
    product_rows_tile<width, NV>({a.data + r * a.stride, a.stride}, x, depth, factor, out + r * kPanel);
  });
}

template <int NV>
void product_sum(Rows a, int64_t rows, const float* x, int64_t features, float* total) {
  in_tiles(features, [&](auto width, int64_t d) {
    product_sum_tile<width, NV>({a.data + d, a.stride}, x, rows, total + d * kPanel);
  });
}

// ---- packing ------------------------------------------------------------------------------------------------------

template <class T>
SLK_INLINE V load_up_to(const T* p, int count) {
  return count == kLanes ? load(p) : load_n(p, count);
}
template <class T>
SLK_INLINE void store_up_to(T* p, V v, int count) {
  count == kLanes ? store(p, v) : store_n(p, v, count);
}
// Calls use(d, count) for runs of kLanes features, and for the rest.
template <class Use>
SLK_INLINE void in_vectors(int64_t features, const Use& use) {
  int64_t d = 0;
  for (; d + kLanes <= features; d += kLanes) use(d, kLanes);
  if (d < features) use(d, int(features - d));
}

// x[d][lane] = src[lane][d] for `rows` <= kPanel rows; the other lanes are zero.
template <class T>
void pack_panel(const T* src, int64_t stride, int64_t rows, int64_t depth, float* x) {
  for (int v = 0; v < kPanelVectors; ++v)
    for (int64_t d = 0; d < depth; d += kLanes) {
      const int width = int(depth - d < kLanes ? depth - d : kLanes);
      V r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = v * kLanes + i;
        r[i] = row >= rows ? zero() : load_up_to(src + row * stride + d, width);
      }
      transpose(r);
      for (int i = 0; i < width; ++i) store(x + (d + i) * kPanel + v * kLanes, r[i]);
    }
}

// dst[lane][d] = factor[lane] * x[d][lane] for `rows` <= kPanel rows.
template <class T>
void unpack_panel(const float* x, const float* factor, int64_t rows, int64_t depth, T* dst, int64_t stride) {
  for (int v = 0; v < kPanelVectors; ++v)
    for (int64_t d = 0; d < depth && v * kLanes < rows; d += kLanes) {
      const int width = int(depth - d < kLanes ? depth - d : kLanes);
      V r[kLanes];
      const V f = load(factor + v * kLanes);
      for (int i = 0; i < kLanes; ++i) r[i] = i < width ? load(x + (d + i) * kPanel + v * kLanes) * f : zero();
      transpose(r);
      for (int i = 0; i < kLanes && v * kLanes + i < rows; ++i)
        store_up_to(dst + (v * kLanes + i) * stride + d, r[i], width);
    }
}

template <class T>
void copy_row(const T* src, int64_t width, float* dst) {
  in_vectors(width, [&](int64_t d, int count) { store_up_to(dst + d, load_up_to(src + d, count), count); });
}

// Rows [0, rows) as fp32: where they lie, or copied to `copy` [rows][width] if they have to be converted, or lie so far
// apart that their lines would share few sets of the cache.
template <class T>
Rows as_rows(const T* src, int64_t stride, int64_t rows, int64_t width, float* copy) {
  if constexpr (std::is_same_v<T, float>)
    if (stride == width) return {src, stride};
  for (int64_t r = 0; r < rows; ++r) copy_row(src + r * stride, width, copy + r * width);
  return {copy, width};
}

// ---- addresses ----------------------------------------------------------------------------------------------------

template <class T>
const T* head(const void* base, const HeadStrides& s, int64_t b, int64_t h, int64_t token = 0) {
  return static_cast<const T*>(base) + b * s.batch + h * s.head + token * s.token;
}
template <class T>
T* head(void* base, const HeadStrides& s, int64_t b, int64_t h, int64_t token = 0) {
  return static_cast<T*>(base) + b * s.batch + h * s.head + token * s.token;
}

// Hands out aligned pieces of a thread's scratch.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += round_up(floats, 16);
    return piece;
  }
};

// ---- tiles and masks ----------------------------------------------------------------------------------------------

// Logits: factor * q.k, or cap * tanh(factor * q.k).
struct Logits {
  float factor, cap;  // cap 0: none
  explicit Logits(const AttentionShape& s)
      : factor(float(s.softcap != 0 ? s.scale / s.softcap : s.scale)), cap(float(s.softcap)) {}
};

// lse to subtract from logits. An empty row keeps nothing: any finite number gives p = exp(-inf) = 0.
SLK_INLINE float finite_lse(float lse) {
  return lse == -__builtin_inff() ? 0.f : lse;
}

// The interval predicate of one mask head: keep(i, j) = j < hi[i] and (j >= lo[i] or j < sink).
struct Interval {
  const int32_t *lo, *hi;  // [Sq] or null
  int32_t sink;

  Interval(const BlockRows& m, int64_t b, int64_t h, int64_t heads_q)
      : lo(m.lo ? m.lo + b * m.lo_batch + m.head_of(h, heads_q) * m.lo_head : nullptr),
        hi(m.hi ? m.hi + b * m.hi_batch + m.head_of(h, heads_q) * m.hi_head : nullptr),
        sink(int32_t(m.sink < 0 ? 0 : min(m.sink, INT32_MAX))) {}

  int32_t low(int64_t i) const { return lo ? lo[i] : INT32_MIN; }
  int32_t high(int64_t i) const { return hi ? hi[i] : INT32_MAX; }
};

// A run of at most kTileKeys keys of one entry (or gathered columns), against a block of queries.
struct Tile {
  Rows k, v;
  Range keys;
  bool partial;
  Interval interval;
  const uint32_t* bits;     // the entry's bit tile [block_m][words], or null
  int64_t words, first;     // first: the key of the bit tile's column 0
  const int32_t* gathered;  // the keys, where they are gathered columns: then keys.begin is 0; else null
};

// kPanel queries or fewer of a block: i0 is the block's first query, `offset` the panel's place in it.
struct QueryPanel {
  int64_t i0, offset, rows;
};

// The keys of a PARTIAL tile that lie between the panel's lowest and highest bound.
inline Range keys_of_panel(const Tile& tile, const QueryPanel& panel) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = panel.i0 + panel.offset; i < panel.i0 + panel.offset + panel.rows; ++i) {
    const int32_t lo = tile.interval.low(i), hi = tile.interval.high(i);
    low = lo < low ? lo : low;
    high = hi > high ? hi : high;
  }
  const bool in_sink = tile.keys.begin < tile.interval.sink;
  return {in_sink || low < tile.keys.begin ? tile.keys.begin : low, min(high, tile.keys.end)};
}

SLK_INLINE VI load_int(const int32_t* p) {
  VI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Lanes are queries: x[j - keys.begin][lane] = fill where (panel query, j) is dropped.
template <int NV>
void mask_queries(const Tile& tile, const QueryPanel& panel, Range keys, float fill, float* x) {
  int32_t lo[kPanel] = {}, hi[kPanel] = {}, word[kPanel] = {};
  for (int64_t i = 0; i < panel.rows; ++i) {
    lo[i] = tile.interval.low(panel.i0 + panel.offset + i);
    hi[i] = tile.interval.high(panel.i0 + panel.offset + i);
  }
  const V dropped = broadcast(fill);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const int64_t column = j - tile.first;
    if (tile.bits && (j == keys.begin || column % 32 == 0))
      for (int64_t i = 0; i < panel.rows; ++i)
        word[i] = int32_t(tile.bits[(panel.offset + i) * tile.words + column / 32]);
    float* row = x + (j - keys.begin) * kPanel;
    for (int v = 0; v < NV; ++v) {
      VI keep = int32_t(j) < load_int(hi + v * kLanes);
      if (j >= tile.interval.sink) keep &= int32_t(j) >= load_int(lo + v * kLanes);
      if (tile.bits) keep &= (VI)((VU)load_int(word + v * kLanes) << uint32_t(31 - column % 32)) < 0;
      store(row + v * kLanes, keep ? load(row + v * kLanes) : dropped);
    }
  }
}

// Calls use(tile) for every tile of a block of queries of one head: entries in their order, then columns.
template <class T, class Use>
void for_each_tile(const AttentionForward& a, AttentionItem item, Scratch scratch, const Use& use) {
  const AttentionShape& shape = a.shape;
  const BlockRows& mask = a.mask;
  const int64_t kv = item.head / (shape.heads_q / shape.heads_kv);
  const int64_t row = mask.list_of(item.batch, item.head, shape.heads_q, item.block, mask.rows.blocks);
  const T *k = head<T>(a.k, a.k_strides, item.batch, kv), *v = head<T>(a.v, a.v_strides, item.batch, kv);
  float *k_copy = scratch.take(kTileKeys * shape.dk), *v_copy = scratch.take(kTileKeys * shape.dv);
  Tile tile = {{}, {},     {}, false, Interval(mask, item.batch, item.head, shape.heads_q), nullptr, mask.block_n / 32,
               0,  nullptr};
  const int64_t first = mask.rows.ptr[row];
  for (int64_t n = 0; n < mask.rows.cnt[row]; ++n) {
    tile.partial = n < mask.rows.nmask[row];
    tile.first = mask.rows.idx[first + n] * mask.unit;
    const int32_t bit_id = mask.rows.bit_id ? mask.rows.bit_id[first + n] : -1;
    tile.bits = bit_id < 0 ? nullptr : mask.bits + bit_id * mask.block_m * tile.words;
    const int64_t end = min(tile.first + mask.block_n, shape.sk);
    for (int64_t j = tile.first; j < end; j += kTileKeys) {
      tile.keys = {j, min(j + kTileKeys, end)};
      tile.k = as_rows(k + j * a.k_strides.token, a.k_strides.token, tile.keys.size(), shape.dk, k_copy);
      tile.v = as_rows(v + j * a.v_strides.token, a.v_strides.token, tile.keys.size(), shape.dv, v_copy);
      use(tile);
    }
  }
  if (!mask.col_ptr) return;
  tile.partial = false;
  for (int64_t c = mask.col_ptr[row]; c < mask.col_ptr[row + 1]; c += kTileKeys) {
    tile.keys = {0, min(kTileKeys, mask.col_ptr[row + 1] - c)};
    for (int64_t n = 0; n < tile.keys.size(); ++n) {
      const int64_t j = mask.col_idx[c + n];
      copy_row(k + j * a.k_strides.token, shape.dk, k_copy + n * shape.dk);
      copy_row(v + j * a.v_strides.token, shape.dv, v_copy + n * shape.dv);
    }
    tile.gathered = mask.col_idx + c;
    tile.k = {k_copy, shape.dk};
    tile.v = {v_copy, shape.dv};
    use(tile);
  }
}

// ---- the parts of the table, one file each ------------------------------------------------------------------------

void attention_delta(const AttentionBackward&, AttentionItem, float* scratch);
void attention_backward_q(const AttentionBackward&, AttentionItem, float* scratch);
void attention_backward_kv(const AttentionBackward&, AttentionItem, float* scratch);
void attention_merge(const MergeStates&, int64_t batch, int64_t head, Range tokens);
void attention_merge_backward(const MergeStatesBackward&, int64_t batch, int64_t head, Range tokens);
void attention_colstats(const AttentionColStats&, AttentionItem part, float* scratch);

}  // namespace slk::cpu::SLK_ISA
