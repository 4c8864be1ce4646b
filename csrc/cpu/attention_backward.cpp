// The backward of block-sparse attention, in two passes that share nothing but delta: dq with queries in the lanes, dk
// and dv with keys in the lanes. Seven products in place of five, for sums that never cross a unit: no atomics, no
// scratch that grows with S. Contract: slkernels/attention.h; products, packing and masks: attention_tile.h.
#include "cpu/attention_tile.h"

namespace slk::cpu::SLK_ISA {
namespace {

// s: logits before the cap -> ds / scale; dp: do v^T -> p when `keep_p`, else scratch. `lse` and `delta` hold one
// number a lane (lanes are queries) or one a row (lanes are keys). `mask` is called between, to zero the p that are
// dropped.
template <int NV, bool kLanesAreQueries, class Mask>
SLK_INLINE void softmax_gradient(const Logits& logits, const float* lse, const float* delta, int64_t rows, float* s,
                                 float* dp, const Mask& mask) {
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = r * kPanel + v * kLanes;
      const V lse_v = kLanesAreQueries ? load(lse + v * kLanes) : broadcast(lse[r]);
      const V delta_v = kLanesAreQueries ? load(delta + v * kLanes) : broadcast(delta[r]);
      V x = load(s + at), g = load(dp + at) - delta_v;
      if (logits.cap != 0) {
        const V t = tanh(x);
        x = t * logits.cap;
        g *= 1.f - t * t;
      }
      store(s + at, exp(x - lse_v));
      store(dp + at, g);
    }
  mask(s);
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = r * kPanel + v * kLanes;
      store(dp + at, load(dp + at) * load(s + at));
    }
}

// ---- dq -----------------------------------------------------------------------------------------------------------

// What stays of a panel of queries.
struct QueryState {
  const float *q, *d_o, *lse, *delta;
  float* dq;
};

template <int NV>
void query_panel_gradient(const Logits& logits, const QueryPanel& panel, const Tile& tile, const QueryState& state,
                          int64_t dk, int64_t dv, float* s, float* dp) {
  const Range live = tile.partial ? keys_of_panel(tile, panel) : tile.keys;
  if (live.size() <= 0) return;
  const Rows k = tile.k.from(live.begin - tile.keys.begin), v = tile.v.from(live.begin - tile.keys.begin);
  product_rows<NV>(k, live.size(), state.q, dk, logits.factor, s);
  product_rows<NV>(v, live.size(), state.d_o, dv, 1.f, dp);
  softmax_gradient<NV, true>(logits, state.lse, state.delta, live.size(), s, dp, [&](float* p) {
    if (tile.partial) mask_queries<NV>(tile, panel, live, 0.f, p);
  });
  product_sum<NV>(k, live.size(), dp, dk, state.dq);
}

template <class T>
void backward_q_block(const AttentionBackward& b, AttentionItem item, Scratch scratch) {
  const AttentionForward& a = b.forward;
  const AttentionShape& shape = a.shape;
  const int64_t i0 = item.block * a.mask.block_m, dk = shape.dk, dv = shape.dv;
  const int64_t queries = min(a.mask.block_m, shape.sq - i0), panels = ceil_div(queries, kPanel);
  float *q = scratch.take(panels * dk * kPanel), *d_o = scratch.take(panels * dv * kPanel);
  float* dq = scratch.take(panels * dk * kPanel);
  float *lse = scratch.take(panels * kPanel), *delta = scratch.take(panels * kPanel);
  float *s = scratch.take(kTileKeys * kPanel), *dp = scratch.take(kTileKeys * kPanel);
  const T* q_rows = head<T>(a.q, a.q_strides, item.batch, item.head, i0);
  const T* d_o_rows = head<T>(b.d_o, b.d_o_strides, item.batch, item.head, i0);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t offset = p * kPanel, rows = min(queries - offset, kPanel);
    pack_panel(q_rows + offset * a.q_strides.token, a.q_strides.token, rows, dk, q + dk * offset);
    pack_panel(d_o_rows + offset * b.d_o_strides.token, b.d_o_strides.token, rows, dv, d_o + dv * offset);
  }
  fill(dq, panels * dk * kPanel, 0.f);
  const int64_t first = (item.batch * shape.heads_q + item.head) * shape.sq + i0;
  for (int64_t i = 0; i < panels * kPanel; ++i) {
    lse[i] = i < queries ? finite_lse(static_cast<const float*>(a.lse)[first + i]) : 0.f;
    delta[i] = i < queries ? static_cast<const float*>(b.delta)[first + i] : 0.f;
  }

  const Logits logits(shape);
  for_each_tile<T>(a, item, scratch, [&](const Tile& tile) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t offset = p * kPanel;
      const QueryPanel panel = {i0, offset, min(queries - offset, kPanel)};
      const QueryState state = {q + dk * offset, d_o + dv * offset, lse + offset, delta + offset, dq + dk * offset};
      const auto step = panel.rows > kLanes ? query_panel_gradient<kPanelVectors> : query_panel_gradient<1>;
      step(logits, panel, tile, state, dk, dv, s, dp);
    }
  });

  float factor[kPanel];
  fill(factor, kPanel, float(shape.scale));
  T* dq_rows = head<T>(b.dq, b.dq_strides, item.batch, item.head, i0);
  for (int64_t p = 0; p < panels; ++p)
    unpack_panel(dq + p * dk * kPanel, factor, min(queries - p * kPanel, kPanel), dk,
                 dq_rows + p * kPanel * b.dq_strides.token, b.dq_strides.token);
}

// ---- dk, dv -------------------------------------------------------------------------------------------------------

// A run of at most kTileKeys queries of one entry, against a block of keys.
struct QueryTile {
  Rows q, d_o;
  const float *lse, *delta;  // of the run's first query; lse as the forward left it
  Range queries;
  bool partial;
  Interval interval;
  const uint32_t* bits;  // the bit tile's row of the run's first query, or null
  int64_t words;
};

// kPanel keys or fewer of a block: j0 is the block's first key, `offset` the panel's place in it.
struct KeyPanel {
  int64_t j0, offset, rows;
};

// The queries of a PARTIAL tile from the first to the last that the interval lets see a key of the panel.
Range queries_of_panel(const QueryTile& tile, const KeyPanel& panel) {
  const int64_t begin = panel.j0 + panel.offset, end = begin + panel.rows;
  const auto blind = [&](int64_t i) {
    return tile.interval.high(i) <= begin || (tile.interval.low(i) >= end && begin >= tile.interval.sink);
  };
  Range live = tile.queries;
  while (live.begin < live.end && blind(live.begin)) ++live.begin;
  while (live.begin < live.end && blind(live.end - 1)) --live.end;
  return live;
}

// Lanes are keys: x[i - queries.begin][lane] = 0 where (i, panel key) is dropped.
template <int NV>
void mask_keys(const QueryTile& tile, const KeyPanel& panel, Range queries, float* x) {
  VI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    const int32_t lo = tile.interval.low(i), hi = tile.interval.high(i);
    for (int v = 0; v < NV; ++v) {
      const int64_t column = panel.offset + v * kLanes;
      const VI j = lane + int32_t(panel.j0 + column);
      VI keep = (j < hi) & ((j >= lo) | (j < tile.interval.sink));
      if (tile.bits) {  // kLanes divides 32 and a vector starts at a multiple of it: its bits lie in one word
        const uint32_t word = tile.bits[(i - tile.queries.begin) * tile.words + column / 32] >> (column % 32);
        keep &= (VI)(((VU{} + word) >> (VU)lane) & 1u) != 0;
      }
      float* at = x + (i - queries.begin) * kPanel + v * kLanes;
      store(at, keep ? load(at) : zero());
    }
  }
}

// What stays of a panel of keys.
struct KeyState {
  const float *k, *v;
  float *dk, *dv;
};

template <int NV>
void key_panel_gradient(const Logits& logits, const KeyPanel& panel, const QueryTile& tile, const KeyState& state,
                        int64_t dk, int64_t dv, float* s, float* dp) {
  const Range live = tile.partial ? queries_of_panel(tile, panel) : tile.queries;
  const int64_t rows = live.size(), skipped = live.begin - tile.queries.begin;
  if (rows <= 0) return;
  const Rows q = tile.q.from(skipped), d_o = tile.d_o.from(skipped);
  float lse[kTileKeys];
  for (int64_t i = 0; i < rows; ++i) lse[i] = finite_lse(tile.lse[skipped + i]);
  product_rows<NV>(q, rows, state.k, dk, logits.factor, s);
  product_rows<NV>(d_o, rows, state.v, dv, 1.f, dp);
  softmax_gradient<NV, false>(logits, lse, tile.delta + skipped, rows, s, dp, [&](float* p) {
    if (tile.partial) mask_keys<NV>(tile, panel, live, p);
  });
  product_sum<NV>(d_o, rows, s, dv, state.dv);
  product_sum<NV>(q, rows, dp, dk, state.dk);
}

// Calls use(tile) for every run of queries that sees the block of keys item.block, head by head of the group.
template <class T, class Use>
void for_each_query_tile(const AttentionBackward& b, AttentionItem item, Scratch scratch, const Use& use) {
  const AttentionForward& a = b.forward;
  const AttentionShape& shape = a.shape;
  const BlockRows& mask = a.mask;
  const int64_t group = shape.heads_q / shape.heads_kv;
  float *q_copy = scratch.take(kTileKeys * shape.dk), *d_o_copy = scratch.take(kTileKeys * shape.dv);
  for (int64_t h = item.head * group; h < (item.head + 1) * group; ++h) {
    const T* q = head<T>(a.q, a.q_strides, item.batch, h);
    const T* d_o = head<T>(b.d_o, b.d_o_strides, item.batch, h);
    const int64_t numbers = (item.batch * shape.heads_q + h) * shape.sq;
    const float *lse = static_cast<const float*>(a.lse) + numbers,
                *delta = static_cast<const float*>(b.delta) + numbers;
    const int64_t column = mask.list_of(item.batch, h, shape.heads_q, item.block, b.cols.blocks);
    QueryTile tile = {
        {}, {}, nullptr, nullptr, {}, false, Interval(mask, item.batch, h, shape.heads_q), nullptr, mask.block_n / 32};
    for (int64_t n = 0; n < b.cols.cnt[column]; ++n) {
      const int64_t t = b.cols.ptr[column] + n, i0 = b.cols.idx[t] * mask.block_m;
      const int64_t end = min(i0 + mask.block_m, shape.sq);
      const int32_t bit_id = b.cols.bit_id ? b.cols.bit_id[t] : -1;
      tile.partial = n < b.cols.nmask[column];
      for (int64_t i = i0; i < end; i += kTileKeys) {
        tile.queries = {i, min(i + kTileKeys, end)};
        tile.q = as_rows(q + i * a.q_strides.token, a.q_strides.token, tile.queries.size(), shape.dk, q_copy);
        tile.d_o = as_rows(d_o + i * b.d_o_strides.token, b.d_o_strides.token, tile.queries.size(), shape.dv, d_o_copy);
        tile.lse = lse + i;
        tile.delta = delta + i;
        tile.bits = bit_id < 0 ? nullptr : mask.bits + (bit_id * mask.block_m + i - i0) * tile.words;
        use(tile);
      }
    }
  }
}

template <class T>
void backward_kv_block(const AttentionBackward& b, AttentionItem item, Scratch scratch) {
  const AttentionForward& a = b.forward;
  const AttentionShape& shape = a.shape;
  const int64_t j0 = item.block * a.mask.block_n, dk = shape.dk, dv = shape.dv;
  const int64_t keys = min(a.mask.block_n, shape.sk - j0), panels = ceil_div(keys, kPanel);
  float *k = scratch.take(panels * dk * kPanel), *v = scratch.take(panels * dv * kPanel);
  float *dk_sum = scratch.take(panels * dk * kPanel), *dv_sum = scratch.take(panels * dv * kPanel);
  float *s = scratch.take(kTileKeys * kPanel), *dp = scratch.take(kTileKeys * kPanel);
  const T* k_rows = head<T>(a.k, a.k_strides, item.batch, item.head, j0);
  const T* v_rows = head<T>(a.v, a.v_strides, item.batch, item.head, j0);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t offset = p * kPanel, rows = min(keys - offset, kPanel);
    pack_panel(k_rows + offset * a.k_strides.token, a.k_strides.token, rows, dk, k + dk * offset);
    pack_panel(v_rows + offset * a.v_strides.token, a.v_strides.token, rows, dv, v + dv * offset);
  }
  fill(dk_sum, panels * dk * kPanel, 0.f);
  fill(dv_sum, panels * dv * kPanel, 0.f);

  const Logits logits(shape);
  for_each_query_tile<T>(b, item, scratch, [&](const QueryTile& tile) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t offset = p * kPanel;
      const KeyPanel panel = {j0, offset, min(keys - offset, kPanel)};
      const KeyState state = {k + dk * offset, v + dv * offset, dk_sum + dk * offset, dv_sum + dv * offset};
      const auto step = panel.rows > kLanes ? key_panel_gradient<kPanelVectors> : key_panel_gradient<1>;
      step(logits, panel, tile, state, dk, dv, s, dp);
    }
  });

  float scale[kPanel], one[kPanel];
  fill(scale, kPanel, float(shape.scale));
  fill(one, kPanel, 1.f);
  T* dk_rows = head<T>(b.dk, b.dk_strides, item.batch, item.head, j0);
  T* dv_rows = head<T>(b.dv, b.dv_strides, item.batch, item.head, j0);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t offset = p * kPanel, rows = min(keys - offset, kPanel);
    unpack_panel(dk_sum + dk * offset, scale, rows, dk, dk_rows + offset * b.dk_strides.token, b.dk_strides.token);
    unpack_panel(dv_sum + dv * offset, one, rows, dv, dv_rows + offset * b.dv_strides.token, b.dv_strides.token);
  }
}

// ---- delta --------------------------------------------------------------------------------------------------------

// do . o is summed in the order of dp = do . v: a query that keeps one key has dp - delta = 0 exactly.
template <class T>
void delta_block(const AttentionBackward& b, AttentionItem item, Scratch scratch) {
  const AttentionForward& a = b.forward;
  const int64_t i0 = item.block * a.mask.block_m, end = min(i0 + a.mask.block_m, a.shape.sq), dv = a.shape.dv;
  const int64_t first = (item.batch * a.shape.heads_q + item.head) * a.shape.sq;
  const float* dlse = static_cast<const float*>(b.dlse);
  float* delta = static_cast<float*>(b.delta) + first;
  float *o = scratch.take(dv * kPanel), *d_o = scratch.take(dv * kPanel);
  for (int64_t i = i0; i < end; i += kPanel) {
    const int64_t rows = min(end - i, kPanel);
    pack_panel(head<T>(a.o, a.o_strides, item.batch, item.head, i), a.o_strides.token, rows, dv, o);
    pack_panel(head<T>(b.d_o, b.d_o_strides, item.batch, item.head, i), b.d_o_strides.token, rows, dv, d_o);
    float dot[kPanel];
    for (int v = 0; v < kPanelVectors; ++v) {
      V total = zero();
      for (int64_t d = 0; d < dv; ++d) total += load(o + d * kPanel + v * kLanes) * load(d_o + d * kPanel + v * kLanes);
      store(dot + v * kLanes, total);
    }
    for (int64_t n = 0; n < rows; ++n) delta[i + n] = dot[n] - (dlse ? dlse[first + i + n] : 0.f);
  }
}

}  // namespace

void attention_delta(const AttentionBackward& b, AttentionItem item, float* scratch) {
  with_float_type(b.forward.shape.dtype, [&](auto* type) { delta_block<Element<decltype(type)>>(b, item, {scratch}); });
}

void attention_backward_q(const AttentionBackward& b, AttentionItem item, float* scratch) {
  with_float_type(b.forward.shape.dtype,
                  [&](auto* type) { backward_q_block<Element<decltype(type)>>(b, item, {scratch}); });
}

void attention_backward_kv(const AttentionBackward& b, AttentionItem item, float* scratch) {
  with_float_type(b.forward.shape.dtype,
                  [&](auto* type) { backward_kv_block<Element<decltype(type)>>(b, item, {scratch}); });
}

}  // namespace slk::cpu::SLK_ISA
