// The forward of block-sparse attention: online softmax over the kept tiles. Contract: slkernels/attention.h; products,
// packing and masks: attention_tile.h.
//
// A unit is a block of queries of one head. Its q and the running o, maximum and sum of every query stay in panels;
// tiles of kKeys keys stream by. Work is 2 M kKeys (Dk + Dv) FLOPs a tile; exp takes about 10 instructions for 16
// elements, 6 % of the products' time at Dk = Dv = 64.
#include "cpu/attention_tile.h"

#include <cfloat>

namespace slk::cpu::SLK_ISA {
namespace {

// A panel's running softmax: maximum and sum of every lane, o[feature][kPanel] not yet divided by the sum.
struct Running {
  float *max, *sum, *o;
};

// Turns a tile's logits s [keys][kPanel] into p, relative to the new maximum, and brings what was summed to it.
template <int NV>
void online_softmax(float* s, int64_t keys, Running run, int64_t dv) {
  V top[NV], total[NV], shrink[NV];
  bool moved = false;
  for (int v = 0; v < NV; ++v) top[v] = load(run.max + v * kLanes);
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < NV; ++v) top[v] = max(load(s + j * kPanel + v * kLanes), top[v]);
  for (int v = 0; v < NV; ++v) {
    const V before = load(run.max + v * kLanes);
    moved |= lanes_without((VI)(top[v] != before), -1) != (1u << kLanes) - 1;
    shrink[v] = exp(before - top[v]);
    total[v] = zero();
  }
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < NV; ++v) {
      float* at = s + j * kPanel + v * kLanes;
      const V p = exp(load(at) - top[v]);
      total[v] += p;
      store(at, p);
    }
  for (int v = 0; v < NV; ++v) {
    store(run.max + v * kLanes, top[v]);
    store(run.sum + v * kLanes, load(run.sum + v * kLanes) * shrink[v] + total[v]);
  }
  for (int64_t d = 0; moved && d < dv; ++d)
    for (int v = 0; v < NV; ++v) {
      float* at = run.o + d * kPanel + v * kLanes;
      store(at, load(at) * shrink[v]);
    }
}

// One panel against one tile.
template <int NV>
void attend_panel(const Logits& logits, const QueryPanel& panel, const Tile& tile, const float* q, Running run,
                  int64_t dk, int64_t dv, float* s) {
  const Range live = tile.partial ? keys_of_panel(tile, panel) : tile.keys;
  if (live.size() <= 0) return;
  product_rows<NV>(tile.k.from(live.begin - tile.keys.begin), live.size(), q, dk, logits.factor, s);
  if (logits.cap != 0)
    for (int64_t at = 0; at < live.size() * kPanel; at += kLanes) store(s + at, tanh(load(s + at)) * logits.cap);
  if (tile.partial) mask_queries<NV>(tile, panel, live, -__builtin_inff(), s);
  online_softmax<NV>(s, live.size(), run, dv);
  product_sum<NV>(tile.v.from(live.begin - tile.keys.begin), live.size(), s, dv, run.o);
}

template <class T>
void forward_block(const AttentionForward& a, AttentionItem item, Scratch scratch) {
  const AttentionShape& shape = a.shape;
  const int64_t i0 = item.block * a.mask.block_m, dk = shape.dk, dv = shape.dv;
  const int64_t queries = i0 + a.mask.block_m < shape.sq ? a.mask.block_m : shape.sq - i0;
  const int64_t panels = ceil_div(queries, kPanel);
  float* q = scratch.take(panels * dk * kPanel);
  float* o = scratch.take(panels * dv * kPanel);
  float *top = scratch.take(panels * kPanel), *total = scratch.take(panels * kPanel);
  float* s = scratch.take(kTileKeys * kPanel);
  const T* q_rows = head<T>(a.q, a.q_strides, item.batch, item.head, i0);
  for (int64_t p = 0; p < panels; ++p)
    pack_panel(q_rows + p * kPanel * a.q_strides.token, a.q_strides.token, min(queries - p * kPanel, kPanel), dk,
               q + p * dk * kPanel);
  fill(o, panels * dv * kPanel, 0.f);
  fill(top, panels * kPanel, -FLT_MAX);
  fill(total, panels * kPanel, 0.f);

  const Logits logits(shape);
  for_each_tile<T>(a, item, scratch, [&](const Tile& tile) {
    for (int64_t p = 0; p < panels; ++p) {
      const QueryPanel panel = {i0, p * kPanel, min(queries - p * kPanel, kPanel)};
      const Running run = {top + p * kPanel, total + p * kPanel, o + p * dv * kPanel};
      const auto attend = panel.rows > kLanes ? attend_panel<kPanelVectors> : attend_panel<1>;
      attend(logits, panel, tile, q + p * dk * kPanel, run, dk, dv, s);
    }
  });

  float* lse = static_cast<float*>(a.lse) + (item.batch * shape.heads_q + item.head) * shape.sq + i0;
  for (int64_t i = 0; i < queries; ++i) {
    lse[i] = total[i] == 0 ? -__builtin_inff() : float(top[i] + __builtin_log(double(total[i])));
    total[i] = total[i] == 0 ? 0.f : 1.f / total[i];
  }
  T* o_rows = head<T>(a.o, a.o_strides, item.batch, item.head, i0);
  for (int64_t p = 0; p < panels; ++p)
    unpack_panel(o + p * dv * kPanel, total + p * kPanel, min(queries - p * kPanel, kPanel), dv,
                 o_rows + p * kPanel * a.o_strides.token, a.o_strides.token);
}

void forward(const AttentionForward& a, AttentionItem item, float* scratch) {
  with_float_type(a.shape.dtype, [&](auto* type) { forward_block<Element<decltype(type)>>(a, item, {scratch}); });
}

// The most that forward, backward_q or backward_kv take: four packed panels of a block, two tiles of products, two
// converted tiles, and a few numbers a query. colstats: a number a key.
int64_t scratch_floats(const AttentionShape& shape, const BlockRows& mask) {
  const int64_t lanes = round_up(mask.block_m > mask.block_n ? mask.block_m : mask.block_n, kPanel);
  return (2 * lanes + kTileKeys) * (shape.dk + shape.dv) + 2 * kTileKeys * kPanel + 4 * lanes + shape.sk + 16 * 16;
}

}  // namespace

extern const AttentionKernels attention_table;
const AttentionKernels attention_table = {
    scratch_floats,        forward,         attention_delta,          attention_backward_q,
    attention_backward_kv, attention_merge, attention_merge_backward, attention_colstats};

}  // namespace slk::cpu::SLK_ISA
