// Column sums, column maxima, diagonal sums and block sums of the softmax, without storing it. Contract:
// slkernels/attention.h; products, packing and masks: attention_tile.h.
//
// p of a tile is made as in the forward, from a given lse, with a query in each lane. Transposed 16 keys at a time it
// has a key in each lane: then queries add up vertically, and a query's diagonal is a run of memory.
#include "cpu/attention_tile.h"

namespace slk::cpu::SLK_ISA {
namespace {

// Where a block of queries is counted: all at key 0, `diagonal` at the distance of position 0 and key 0.
struct Columns {
  float *sum, *max;
  float* diagonal;
};

// Counts `rows` queries and `count` keys, p[key][kPanel]. `position` is that of the first query, `key` the first key.
void count_keys(const float* p, int64_t rows, int count, int64_t position, int64_t key, Columns to) {
  V total = zero(), top = load_up_to(to.max + key, count);
  for (int64_t v = 0; v * kLanes < rows; ++v) {
    V r[kLanes];
    for (int j = 0; j < kLanes; ++j) r[j] = j < count ? load(p + j * kPanel + v * kLanes) : zero();
    transpose(r);
    for (int64_t i = 0; i < kLanes && v * kLanes + i < rows; ++i) {
      total += r[i];
      top = max(r[i], top);
      float* diagonal = to.diagonal + key - (position + v * kLanes + i);
      store_up_to(diagonal, load_up_to(diagonal, count) + r[i], count);
    }
  }
  store_up_to(to.sum + key, load_up_to(to.sum + key, count) + total, count);
  store_up_to(to.max + key, top, count);
}

// The same for keys that are not neighbours.
void count_gathered(const float* p, int64_t rows, const int32_t* keys, int64_t count, int64_t position, Columns to) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t i = 0; i < rows; ++i) {
      const float x = p[n * kPanel + i];
      to.sum[keys[n]] += x;
      to.max[keys[n]] = x > to.max[keys[n]] ? x : to.max[keys[n]];
      to.diagonal[keys[n] - (position + i)] += x;
    }
}

// Adds the blocks' sums of what one block of queries put into `sum` to block_sum, and `sum` to col_sum.
void close_block(const float* sum, const AttentionShape& shape, int64_t block_n, float* col_sum, float* block_sum) {
  for (int64_t j = 0; j < shape.sk; ++j) {
    col_sum[j] += sum[j];
    block_sum[j / block_n] += sum[j];
  }
}

template <class T>
void colstats_part(const AttentionColStats& c, AttentionItem part, Scratch scratch) {
  const AttentionForward& a = c.forward;
  const AttentionShape& shape = a.shape;
  const BlockRows& mask = a.mask;
  const int64_t first = c.queries.begin / mask.block_m, blocks = ceil_div(c.queries.end, mask.block_m) - first;
  const int64_t begin = first + blocks * part.block / c.parts, end = first + blocks * (part.block + 1) / c.parts;
  const int64_t head_index = part.batch * shape.heads_q + part.head, place = head_index * c.parts + part.block;
  float *col_sum = c.col_sum + place * shape.sk, *col_max = c.col_max + place * shape.sk;
  float* diagonal = c.diagonal + place * (shape.sk + shape.sq - 1);
  fill(col_sum, shape.sk, 0.f);
  fill(col_max, shape.sk, 0.f);
  fill(diagonal, shape.sk + shape.sq - 1, 0.f);
  float *q = scratch.take(shape.dk * kPanel), *s = scratch.take(kTileKeys * kPanel), *sum = scratch.take(shape.sk);
  const T* q_rows = head<T>(a.q, a.q_strides, part.batch, part.head);
  const float* lse = static_cast<const float*>(a.lse) + head_index * shape.sq;
  const Logits logits(shape);
  const int64_t shift = shape.sk - shape.sq, key_blocks = ceil_div(shape.sk, mask.block_n);

  for (int64_t block = begin; block < end; ++block) {
    const int64_t i0 = block * mask.block_m, row_begin = i0 > c.queries.begin ? i0 : c.queries.begin;
    const int64_t row_end = min(i0 + mask.block_m, c.queries.end);
    fill(sum, shape.sk, 0.f);
    const Columns to = {sum, col_max, diagonal + shape.sk - 1};
    for (int64_t i = row_begin; i < row_end; i += kPanel) {
      const QueryPanel panel = {i0, i - i0, min(row_end - i, kPanel)};
      float lse_row[kPanel];
      for (int64_t n = 0; n < kPanel; ++n) lse_row[n] = n < panel.rows ? finite_lse(lse[i + n]) : 0.f;
      pack_panel(q_rows + i * a.q_strides.token, a.q_strides.token, panel.rows, shape.dk, q);
      for_each_tile<T>(a, {part.batch, part.head, block}, scratch, [&](const Tile& tile) {
        const Range live = tile.partial ? keys_of_panel(tile, panel) : tile.keys;
        if (live.size() <= 0) return;
        product_rows<kPanelVectors>(tile.k.from(live.begin - tile.keys.begin), live.size(), q, shape.dk, logits.factor,
                                    s);
        for (int64_t at = 0; at < live.size() * kPanel; at += kLanes) {
          const V x = load(s + at), logit = logits.cap != 0 ? tanh(x) * logits.cap : x;
          store(s + at, exp(logit - load(lse_row + at % kPanel)));
        }
        if (tile.partial) mask_queries<kPanelVectors>(tile, panel, live, 0.f, s);
        if (tile.gathered) return count_gathered(s, panel.rows, tile.gathered, live.size(), i + shift, to);
        for (int64_t j = live.begin; j < live.end; j += kLanes)
          count_keys(s + (j - live.begin) * kPanel, panel.rows, int(min(kLanes, live.end - j)), i + shift, j, to);
      });
    }
    float* block_sum = c.block_sum + (head_index * mask.rows.blocks + block) * key_blocks;
    close_block(sum, shape, mask.block_n, col_sum, block_sum);
  }
}

}  // namespace

void attention_colstats(const AttentionColStats& c, AttentionItem part, float* scratch) {
  with_float_type(c.forward.shape.dtype,
                  [&](auto* type) { colstats_part<Element<decltype(type)>>(c, part, {scratch}); });
}

}  // namespace slk::cpu::SLK_ISA
