// Block-sparse attention in fp64, a row at a time: what gradient checks compare with. Contract: slkernels/attention.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "slkernels/attention.h"
#include "slkernels/attention_merge.cuh"

namespace slk::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

const double* row(const void* base, const HeadStrides& s, int64_t b, int64_t h, int64_t token) {
  return static_cast<const double*>(base) + b * s.batch + h * s.head + token * s.token;
}
double* row(void* base, const HeadStrides& s, int64_t b, int64_t h, int64_t token) {
  return static_cast<double*>(base) + b * s.batch + h * s.head + token * s.token;
}
double dot(const double* a, const double* b, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}
void add(double factor, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}
void clear(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// Whether a PARTIAL entry keeps (i, j); h is the mask's head.
bool kept(const BlockRows& m, int64_t b, int64_t h, int64_t i, int64_t j, int32_t bit_id, int64_t column) {
  const bool below = !m.hi || j < m.hi[b * m.hi_batch + h * m.hi_head + i];
  const bool above = !m.lo || j >= m.lo[b * m.lo_batch + h * m.lo_head + i] || j < m.sink;
  if (bit_id < 0) return below && above;
  const uint32_t word = m.bits[(bit_id * m.block_m + i % m.block_m) * (m.block_n / 32) + column / 32];
  return below && above && (word >> (column % 32) & 1);
}

// The keys that query i of head h keeps, in the layout's order.
std::vector<int64_t> keys_of(const AttentionForward& a, int64_t b, int64_t h, int64_t i) {
  const BlockRows& m = a.mask;
  const int64_t r = m.list_of(b, h, a.shape.heads_q, i / m.block_m, m.rows.blocks);
  std::vector<int64_t> keys;
  for (int64_t n = 0; n < m.rows.cnt[r]; ++n) {
    const int64_t t = m.rows.ptr[r] + n, first = m.rows.idx[t] * m.unit;
    const int32_t bit_id = m.rows.bit_id ? m.rows.bit_id[t] : -1;
    for (int64_t j = first; j < std::min(first + m.block_n, a.shape.sk); ++j)
      if (n >= m.rows.nmask[r] || kept(m, b, m.head_of(h, a.shape.heads_q), i, j, bit_id, j - first)) keys.push_back(j);
  }
  if (m.col_ptr) keys.insert(keys.end(), m.col_idx + m.col_ptr[r], m.col_idx + m.col_ptr[r + 1]);
  return keys;
}

// The logit of q and k, and its slope with respect to scale * q.k.
struct Logit {
  double value, slope;
  Logit(const AttentionShape& s, const double* q, const double* k) : value(dot(q, k, s.dk) * s.scale), slope(1) {
    if (s.softcap == 0) return;
    const double t = std::tanh(value / s.softcap);
    value = s.softcap * t;
    slope = 1 - t * t;
  }
};

int64_t no_scratch(const AttentionShape&, const BlockRows&) {
  return 0;
}

void forward(const AttentionForward& a, AttentionItem item, float*) {
  const AttentionShape& s = a.shape;
  const int64_t kv = item.head / (s.heads_q / s.heads_kv), i0 = item.block * a.mask.block_m;
  std::vector<double> logits;
  for (int64_t i = i0; i < std::min(i0 + a.mask.block_m, s.sq); ++i) {
    const double* q = row(a.q, a.q_strides, item.batch, item.head, i);
    const std::vector<int64_t> keys = keys_of(a, item.batch, item.head, i);
    logits.clear();
    double top = -kInfinity, total = 0;
    for (const int64_t j : keys) {
      logits.push_back(Logit(s, q, row(a.k, a.k_strides, item.batch, kv, j)).value);
      top = std::max(top, logits.back());
    }
    for (double x : logits) total += std::exp(x - top);
    const double lse = total == 0 ? -kInfinity : top + std::log(total);
    static_cast<double*>(a.lse)[(item.batch * s.heads_q + item.head) * s.sq + i] = lse;
    double* o = row(a.o, a.o_strides, item.batch, item.head, i);
    clear(o, s.dv);
    for (size_t n = 0; n < keys.size(); ++n)
      add(std::exp(logits[n] - lse), row(a.v, a.v_strides, item.batch, kv, keys[n]), s.dv, o);
  }
}

void delta(const AttentionBackward& g, AttentionItem item, float*) {
  const AttentionShape& s = g.forward.shape;
  const int64_t i0 = item.block * g.forward.mask.block_m;
  for (int64_t i = i0; i < std::min(i0 + g.forward.mask.block_m, s.sq); ++i) {
    const int64_t at = (item.batch * s.heads_q + item.head) * s.sq + i;
    const double* o = row(g.forward.o, g.forward.o_strides, item.batch, item.head, i);
    const double* d_o = row(g.d_o, g.d_o_strides, item.batch, item.head, i);
    static_cast<double*>(g.delta)[at] = dot(o, d_o, s.dv) - (g.dlse ? static_cast<const double*>(g.dlse)[at] : 0);
  }
}

// p and ds of one kept pair.
struct Pair {
  double p, ds;
  Pair(const AttentionBackward& g, int64_t b, int64_t h, int64_t kv, int64_t i, int64_t j) {
    const AttentionForward& a = g.forward;
    const int64_t at = (b * a.shape.heads_q + h) * a.shape.sq + i;
    const Logit s(a.shape, row(a.q, a.q_strides, b, h, i), row(a.k, a.k_strides, b, kv, j));
    const double dp = dot(row(g.d_o, g.d_o_strides, b, h, i), row(a.v, a.v_strides, b, kv, j), a.shape.dv);
    p = std::exp(s.value - static_cast<const double*>(a.lse)[at]);
    ds = p * (dp - static_cast<const double*>(g.delta)[at]) * s.slope;
  }
};

void backward_q(const AttentionBackward& g, AttentionItem item, float*) {
  const AttentionForward& a = g.forward;
  const int64_t kv = item.head / (a.shape.heads_q / a.shape.heads_kv), i0 = item.block * a.mask.block_m;
  for (int64_t i = i0; i < std::min(i0 + a.mask.block_m, a.shape.sq); ++i) {
    double* dq = row(g.dq, g.dq_strides, item.batch, item.head, i);
    clear(dq, a.shape.dk);
    for (const int64_t j : keys_of(a, item.batch, item.head, i))
      add(a.shape.scale * Pair(g, item.batch, item.head, kv, i, j).ds, row(a.k, a.k_strides, item.batch, kv, j),
          a.shape.dk, dq);
  }
}

void backward_kv(const AttentionBackward& g, AttentionItem item, float*) {
  const AttentionForward& a = g.forward;
  const BlockRows& m = a.mask;
  const int64_t group = a.shape.heads_q / a.shape.heads_kv, j0 = item.block * m.block_n;
  for (int64_t j = j0; j < std::min(j0 + m.block_n, a.shape.sk); ++j) {
    double *dk = row(g.dk, g.dk_strides, item.batch, item.head, j),
           *dv = row(g.dv, g.dv_strides, item.batch, item.head, j);
    clear(dk, a.shape.dk);
    clear(dv, a.shape.dv);
    for (int64_t h = item.head * group; h < (item.head + 1) * group; ++h) {
      const int64_t c = m.list_of(item.batch, h, a.shape.heads_q, item.block, g.cols.blocks);
      for (int64_t n = 0; n < g.cols.cnt[c]; ++n) {
        const int64_t t = g.cols.ptr[c] + n, i0 = g.cols.idx[t] * m.block_m;
        const int32_t bit_id = g.cols.bit_id ? g.cols.bit_id[t] : -1;
        for (int64_t i = i0; i < std::min(i0 + m.block_m, a.shape.sq); ++i) {
          if (n < g.cols.nmask[c] && !kept(m, item.batch, m.head_of(h, a.shape.heads_q), i, j, bit_id, j - j0))
            continue;
          const Pair pair(g, item.batch, h, item.head, i, j);
          add(a.shape.scale * pair.ds, row(a.q, a.q_strides, item.batch, h, i), a.shape.dk, dk);
          add(pair.p, row(g.d_o, g.d_o_strides, item.batch, h, i), a.shape.dv, dv);
        }
      }
    }
  }
}

// ---- merging ------------------------------------------------------------------------------------------------------

const double* numbers(const void* base, const MergeStates& a, int64_t b, int64_t h) {
  return static_cast<const double*>(base) + (b * a.heads + h) * a.tokens;
}
double* numbers(void* base, const MergeStates& a, int64_t b, int64_t h) {
  return static_cast<double*>(base) + (b * a.heads + h) * a.tokens;
}

void merge(const MergeStates& a, int64_t b, int64_t h, Range tokens) {
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    const MergeWeights w(numbers(a.lse1, a, b, h)[i], numbers(a.lse2, a, b, h)[i]);
    numbers(a.lse, a, b, h)[i] = w.lse;
    double* o = row(a.o, a.o_strides, b, h, i);
    clear(o, a.features);
    add(w.first, row(a.o1, a.o1_strides, b, h, i), a.features, o);
    add(w.second, row(a.o2, a.o2_strides, b, h, i), a.features, o);
  }
}

void merge_backward(const MergeStatesBackward& g, int64_t b, int64_t h, Range tokens) {
  const MergeStates& a = g.forward;
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    const MergeWeights w(numbers(a.lse1, a, b, h)[i], numbers(a.lse2, a, b, h)[i]);
    const double* d_o = row(g.d_o, g.d_o_strides, b, h, i);
    const double difference =
        dot(d_o, row(a.o1, a.o1_strides, b, h, i), a.features) - dot(d_o, row(a.o2, a.o2_strides, b, h, i), a.features);
    const double dlse = g.dlse ? numbers(g.dlse, a, b, h)[i] : 0;
    numbers(g.dlse1, a, b, h)[i] = w.first * (dlse + w.second * difference);
    numbers(g.dlse2, a, b, h)[i] = w.second * (dlse - w.first * difference);
    double *do1 = row(g.do1, g.do1_strides, b, h, i), *do2 = row(g.do2, g.do2_strides, b, h, i);
    clear(do1, a.features);
    clear(do2, a.features);
    add(w.first, d_o, a.features, do1);
    add(w.second, d_o, a.features, do2);
  }
}

}  // namespace

const AttentionKernels& attention_kernels_f64() {
  static const AttentionKernels table = {no_scratch,  forward, delta,          backward_q,
                                         backward_kv, merge,   merge_backward, nullptr};
  return table;
}

}  // namespace slk::cpu
