// Runs the attention kernels under the harness on random layouts, against the formulas of slkernels/attention.h in
// fp64. Used by attention_*.cpp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/attention.h"

namespace attention_check {

using slk::AttentionBackward;
using slk::AttentionForward;
using slk::BlockList;
using slk::ceil_div;
using slk::DType;
using slk::HeadStrides;

struct Case {
  const char* name;
  int64_t sq = 64, sk = 64, dk = 64, dv = 64;
  int64_t batch = 1, heads_q = 1, heads_kv = 1, mask_batch = 1, mask_heads = 1;
  int64_t block_m = 64, block_n = 64;
  bool token_offsets = false;  // unit = 1, entries anywhere
  double density = 0.6;        // of entries
  double partial = 0.5;        // of which so many are PARTIAL
  bool bounds = true, bits = true, columns = false, corrupt = false, tokens_first = false, dlse = true;
  double scale = 0.125, softcap = 0;
  DType dtype = DType::bf16;
};

inline double to_double(uint16_t bits, DType type) {
  if (type == DType::bf16) return double(__bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits})));
  return double(__half2float(__half(__half_raw{bits})));
}
inline uint16_t to_bits(double x, DType type) {
  if (type == DType::bf16) return __nv_bfloat16_raw(__float2bfloat16_rn(float(x))).x;
  return __half_raw(__float2half_rn(float(x))).x;
}

// A [B, H, S, D] tensor in device memory; between its rows, and behind its tokens, lies NaN.
struct Tensor4 {
  int64_t b, h, s, d;
  HeadStrides strides;
  DType type;
  std::unique_ptr<simt::Buffer<uint16_t>> data;

  Tensor4(int64_t b_, int64_t h_, int64_t s_, int64_t d_, bool tokens_first, DType t)
      : b(b_), h(h_), s(s_), d(d_), type(t) {
    const int64_t row = d + 8;
    strides = tokens_first ? HeadStrides{s * h * row, row, h * row} : HeadStrides{h * s * row, s * row, row};
    data = std::make_unique<simt::Buffer<uint16_t>>(size_t(std::max<int64_t>(1, b * h * s * row)));
  }
  int64_t at(int64_t ib, int64_t ih, int64_t is, int64_t id) const {
    return ib * strides.batch + ih * strides.head + is * strides.token + id;
  }
  double operator()(int64_t ib, int64_t ih, int64_t is, int64_t id) const {
    return to_double((*data)[at(ib, ih, is, id)], type);
  }
  void set(int64_t ib, int64_t ih, int64_t is, int64_t id, double x) { (*data)[at(ib, ih, is, id)] = to_bits(x, type); }
  void fill(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for_each([&](int64_t ib, int64_t ih, int64_t is, int64_t id) { set(ib, ih, is, id, normal(random)); });
  }
  template <class F>
  void for_each(const F& f) const {
    for (int64_t ib = 0; ib < b; ++ib)
      for (int64_t ih = 0; ih < h; ++ih)
        for (int64_t is = 0; is < s; ++is)
          for (int64_t id = 0; id < d; ++id) f(ib, ih, is, id);
  }
  void* get() const { return data->get(); }
};

using Ints = simt::Buffer<int32_t>;

struct ListStorage {
  std::vector<int32_t> ptr, cnt, nmask, idx, bit_id;
  std::unique_ptr<Ints> d_ptr, d_cnt, d_nmask, d_idx, d_bit_id;
  struct Entry {
    int32_t index, bit;
  };
  // A row with some slack behind it, which holds what must not be read.
  void add(const std::vector<Entry>& partial, const std::vector<Entry>& full) {
    ptr.push_back(int32_t(idx.size()));
    cnt.push_back(int32_t(partial.size() + full.size()));
    nmask.push_back(int32_t(partial.size()));
    for (const auto* entries : {&partial, &full})
      for (const Entry& e : *entries) {
        idx.push_back(e.index);
        bit_id.push_back(e.bit);
      }
    idx.push_back(0);
    bit_id.push_back(1 << 20);
  }
  BlockList upload(int64_t blocks, bool with_bits) {
    d_ptr = std::make_unique<Ints>(ptr);
    d_cnt = std::make_unique<Ints>(cnt);
    d_nmask = std::make_unique<Ints>(nmask);
    d_idx = std::make_unique<Ints>(idx);
    d_bit_id = std::make_unique<Ints>(bit_id);
    return {d_ptr->get(),        d_cnt->get(), d_nmask->get(), d_idx->get(), with_bits ? d_bit_id->get() : nullptr,
            int64_t(idx.size()), blocks};
  }
};

// A random layout and the dense mask that it means, built side by side.
struct Layout {
  slk::BlockRows rows;
  BlockList cols;
  std::vector<bool> keep;  // [mask_batch, mask_heads, sq, sk]
  ListStorage row_lists, col_lists;
  std::unique_ptr<Ints> lo, hi, col_ptr, col_idx;
  std::unique_ptr<simt::Buffer<uint32_t>> bits;

  Layout(const Case& c, std::mt19937& random) {
    const auto chance = [&](double p) { return std::uniform_real_distribution<>()(random) < p; };
    const auto below = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random); };
    const int64_t blocks = ceil_div(c.sq, c.block_m), kv_blocks = ceil_div(c.sk, c.block_n);
    const int64_t masks = c.mask_batch * c.mask_heads, words = c.block_n / 32, sink = 5;
    keep.assign(size_t(masks * c.sq * c.sk), false);
    std::vector<int32_t> los, his, pointers = {0}, columns;
    for (int64_t i = 0; i < masks * c.sq; ++i) {
      los.push_back(int32_t(below(c.sk)));
      his.push_back(los.back() + int32_t(below(c.sk)));
    }
    std::vector<uint32_t> bit_words;
    struct Kept {
      int64_t iq, jk;
      int32_t bit;
      bool partial;
    };
    for (int64_t mask = 0; mask < masks; ++mask) {
      std::vector<Kept> kept;
      for (int64_t iq = 0; iq < blocks; ++iq) {
        std::vector<ListStorage::Entry> partial, full;
        const bool empty = blocks > 1 && iq == 0 && mask == 0;  // one row of the first mask keeps nothing
        int64_t jk = 0;
        for (int64_t at = c.token_offsets ? below(40) : 0; at < c.sk && !empty;
             at += c.block_n + (c.token_offsets ? below(40) : 0), ++jk) {
          if (!chance(c.density)) continue;
          const bool masked = chance(c.partial);
          int32_t bit = -1;
          if (masked && c.bits && chance(0.7)) {
            bit = int32_t(bit_words.size()) / int32_t(c.block_m * words);
            for (int64_t w = 0; w < c.block_m * words; ++w) bit_words.push_back(uint32_t(random()));
          }
          const bool wrong_bit = c.corrupt && masked && chance(0.3);
          (masked ? partial : full).push_back({int32_t(c.token_offsets ? at : jk), wrong_bit ? 1 << 20 : bit});
          kept.push_back({iq, jk, bit, masked});
          for (int64_t i = iq * c.block_m; i < std::min(c.sq, (iq + 1) * c.block_m); ++i)
            for (int64_t j = at; j < std::min(c.sk, at + c.block_n); ++j) {
              bool k = !wrong_bit;
              if (masked && c.bounds) {
                const int32_t low = los[mask * c.sq + i], high = his[mask * c.sq + i];
                k &= j < high && (j >= low || j < sink);
              }
              if (bit >= 0) {
                const int64_t row = int64_t(bit) * c.block_m + i - iq * c.block_m, column = j - at;
                k &= bit_words[row * words + column / 32] >> column % 32 & 1;
              }
              if (k) keep[(mask * c.sq + i) * c.sk + j] = true;
            }
        }
        if (c.corrupt) full.push_back({iq % 2 ? -3 : std::numeric_limits<int32_t>::max(), -1});
        std::shuffle(full.begin(), full.end(), random);
        row_lists.add(partial, full);
        if (c.columns && !empty)
          for (int64_t j = 0; j < c.sk; ++j) {
            bool free = true;  // of all that the entries cover, kept or not
            for (const auto* entries : {&partial, &full})
              for (const auto& e : *entries) {
                const int64_t start = c.token_offsets ? e.index : int64_t(e.index) * c.block_n;
                free &= !(j >= start && j < start + c.block_n);
              }
            if (!free || !chance(0.3)) continue;
            columns.push_back(int32_t(j));
            for (int64_t i = iq * c.block_m; i < std::min(c.sq, (iq + 1) * c.block_m); ++i)
              keep[(mask * c.sq + i) * c.sk + j] = true;
          }
        if (c.columns && c.corrupt) columns.push_back(-1);
        pointers.push_back(int32_t(columns.size()));
      }
      for (int64_t jk = 0; jk < kv_blocks; ++jk) {
        std::vector<ListStorage::Entry> partial, full;
        for (const Kept& k : kept)
          if (k.jk == jk) (k.partial ? partial : full).push_back({int32_t(k.iq), k.bit});
        if (c.corrupt) full.push_back({jk % 2 ? -3 : std::numeric_limits<int32_t>::max(), -1});
        col_lists.add(partial, full);
      }
    }
    if (c.corrupt) {  // the last row reaches beyond the pool
      row_lists.cnt.back() += 100;
      col_lists.cnt.back() += 100;
      row_lists.idx.back() = col_lists.idx.back() = -1;
    }
    rows = {};
    rows.rows = row_lists.upload(blocks, c.bits);
    cols = col_lists.upload(kv_blocks, c.bits);
    rows.batches = c.mask_batch;
    rows.heads = c.mask_heads;
    rows.block_m = c.block_m;
    rows.block_n = c.block_n;
    rows.unit = c.token_offsets ? 1 : c.block_n;
    if (c.bounds) {
      lo = std::make_unique<Ints>(los);
      hi = std::make_unique<Ints>(his);
      rows.lo = lo->get();
      rows.hi = hi->get();
      rows.lo_head = rows.hi_head = c.mask_heads > 1 ? c.sq : 0;
      rows.lo_batch = rows.hi_batch = c.mask_batch > 1 ? c.mask_heads * c.sq : 0;
      rows.sink = sink;
    }
    bits = std::make_unique<simt::Buffer<uint32_t>>(bit_words);
    rows.bits = bits->get();
    rows.bit_tiles = int64_t(bit_words.size()) / (c.block_m * words);
    if (c.columns) {
      col_ptr = std::make_unique<Ints>(pointers);
      col_idx = std::make_unique<Ints>(columns);
      rows.col_ptr = col_ptr->get();
      rows.col_idx = col_idx->get();
      rows.columns = int64_t(columns.size());
    }
  }
  bool kept(const Case& c, int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t mask = (c.mask_batch == 1 ? 0 : b) * c.mask_heads + h / (c.heads_q / c.mask_heads);
    return keep[(mask * c.sq + i) * c.sk + j];
  }
};

struct Problem {
  const Case& c;
  std::mt19937 random{7};
  Layout layout;
  Tensor4 q, k, v, o;
  simt::Buffer<float> lse;

  explicit Problem(const Case& case_)
      : c(case_),
        layout(c, random),
        q(c.batch, c.heads_q, c.sq, c.dk, c.tokens_first, c.dtype),
        k(c.batch, c.heads_kv, c.sk, c.dk, c.tokens_first, c.dtype),
        v(c.batch, c.heads_kv, c.sk, c.dv, c.tokens_first, c.dtype),
        o(c.batch, c.heads_q, c.sq, c.dv, c.tokens_first, c.dtype),
        lse(size_t(c.batch * c.heads_q * c.sq)) {
    q.fill(random);
    k.fill(random);
    v.fill(random);
  }
  AttentionForward forward() {
    AttentionForward f = {};
    f.shape = {c.batch, c.heads_q, c.heads_kv, c.sq, c.sk, c.dk, c.dv, c.scale, c.softcap, c.dtype};
    f.mask = layout.rows;
    f.q = q.get();
    f.k = k.get();
    f.v = v.get();
    f.o = o.get();
    f.lse = lse.get();
    f.q_strides = q.strides;
    f.k_strides = k.strides;
    f.v_strides = v.strides;
    f.o_strides = o.strides;
    return f;
  }
  // Relative, of one rounding to the dtype.
  double rounding() const { return c.dtype == DType::bf16 ? std::ldexp(1, -8) : std::ldexp(1, -11); }
  int64_t kv_head(int64_t h) const { return h / (c.heads_q / c.heads_kv); }
  // The logits of a query; -inf where dropped. `slope`: their derivative by scale * product.
  void logits(int64_t b, int64_t h, int64_t i, std::vector<double>& s, std::vector<double>& slope) const {
    s.assign(size_t(c.sk), -INFINITY);
    slope.assign(size_t(c.sk), 1);
    for (int64_t j = 0; j < c.sk; ++j) {
      if (!layout.kept(c, b, h, i, j)) continue;
      double dot = 0;
      for (int64_t d = 0; d < c.dk; ++d) dot += q(b, h, i, d) * k(b, kv_head(h), j, d);
      s[j] = dot * c.scale;
      if (c.softcap > 0) {
        const double t = std::tanh(s[j] / c.softcap);
        s[j] = c.softcap * t;
        slope[j] = 1 - t * t;
      }
    }
  }
  static double log_sum(const std::vector<double>& s) {
    double top = -INFINITY, sum = 0;
    for (double x : s) top = std::max(top, x);
    if (top == -INFINITY) return top;
    for (double x : s) sum += std::exp(x - top);
    return top + std::log(sum);
  }
};

class Errors {
 public:
  explicit Errors(const char* name) : name_(name) {}
  void expect(const char* what, int64_t b, int64_t h, int64_t i, int64_t d, double got, double want, double bound) {
    if (got == want || std::fabs(got - want) <= bound) return;
    if (count_++ < 5)
      std::printf("  %s: %s[%ld, %ld, %ld, %ld] = %g, want %g +- %g\n", name_, what, long(b), long(h), long(i), long(d),
                  got, want, bound);
  }
  // What lies between rows must still be NaN.
  void expect_gaps(const char* what, const Tensor4& t) {
    std::vector<bool> inside(t.data->size());
    t.for_each([&](int64_t b, int64_t h, int64_t s, int64_t d) { inside[t.at(b, h, s, d)] = true; });
    for (size_t i = 0; i < inside.size(); ++i)
      if (!inside[i] && (*t.data)[i] != 0xffff && count_++ < 5) std::printf("  %s: %s written outside\n", name_, what);
  }
  bool none() const {
    if (count_) std::printf("FAIL %s: %ld errors\n", name_, long(count_));
    return count_ == 0;
  }

 private:
  const char* name_;
  int64_t count_ = 0;
};

using Forward = cudaError_t (*)(const AttentionForward&, cudaStream_t);

inline bool run_forward(Forward launch, const Case& c) {
  Problem p(c);
  Errors errors(c.name);
  const cudaError_t error = launch(p.forward(), nullptr);
  if (error != cudaSuccess) {
    std::printf("FAIL %s: error %d\n", c.name, int(error));
    return false;
  }
  std::vector<double> s, slope;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads_q; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        p.logits(b, h, i, s, slope);
        const double lse = Problem::log_sum(s);
        errors.expect("lse", b, h, i, 0, double(p.lse[(b * c.heads_q + h) * c.sq + i]), lse,
                      1e-5 * (1 + std::fabs(lse)));
        for (int64_t d = 0; d < c.dv; ++d) {
          double want = 0, size = 0;
          for (int64_t j = 0; j < c.sk; ++j) {
            if (s[j] == -INFINITY) continue;
            const double term = std::exp(s[j] - lse) * p.v(b, p.kv_head(h), j, d);
            want += term;
            size += std::fabs(term);
          }
          // p and o are rounded once each.
          errors.expect("o", b, h, i, d, p.o(b, h, i, d), want, 1.01 * p.rounding() * (size + std::fabs(want)));
        }
      }
  errors.expect_gaps("o", p.o);
  return errors.none();
}

using Backward = cudaError_t (*)(const AttentionBackward&, cudaStream_t);

// The kernel gets o rounded to the dtype and lse in fp32, as the forward leaves them; so does the reference. Bounds: p,
// ds and the results are rounded once each.
inline bool run_backward(Backward launch, const Case& c) {
  Problem p(c);
  Errors errors(c.name);
  Tensor4 d_o(c.batch, c.heads_q, c.sq, c.dv, c.tokens_first, c.dtype);
  Tensor4 dq(c.batch, c.heads_q, c.sq, c.dk, c.tokens_first, c.dtype);
  Tensor4 dk(c.batch, c.heads_kv, c.sk, c.dk, c.tokens_first, c.dtype);
  Tensor4 dv(c.batch, c.heads_kv, c.sk, c.dv, c.tokens_first, c.dtype);
  simt::Buffer<float> dlse(p.lse.size()), delta(p.lse.size());
  d_o.fill(p.random);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < dlse.size(); ++i) dlse[i] = normal(p.random);

  using Sums = std::vector<double>;
  const auto zeros = [](const Tensor4& t) { return Sums(t.data->size()); };
  Sums want_q = zeros(dq), want_k = zeros(dk), want_v = zeros(dv), size_q = want_q, size_k = want_k, size_v = want_v;
  Sums s, slope;
  const auto add = [](Sums& want, Sums& size, int64_t at, double term, double magnitude) {
    want[at] += term;
    size[at] += magnitude;
  };
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads_q; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        const int64_t row = (b * c.heads_q + h) * c.sq + i, kv = p.kv_head(h);
        p.logits(b, h, i, s, slope);
        const double lse = Problem::log_sum(s);
        p.lse[row] = float(lse);
        double row_delta = c.dlse ? -dlse[row] : 0;
        for (int64_t d = 0; d < c.dv; ++d) {
          double sum = 0;
          for (int64_t j = 0; j < c.sk; ++j)
            if (s[j] != -INFINITY) sum += std::exp(s[j] - lse) * p.v(b, kv, j, d);
          p.o.set(b, h, i, d, sum);
          row_delta += p.o(b, h, i, d) * d_o(b, h, i, d);
        }
        for (int64_t j = 0; j < c.sk; ++j) {
          if (s[j] == -INFINITY) continue;
          const double prob = std::exp(s[j] - p.lse[row]);
          double dp = 0, dp_size = 0;
          for (int64_t d = 0; d < c.dv; ++d) {
            const double g = d_o(b, h, i, d), term = g * p.v(b, kv, j, d);
            dp += term;
            dp_size += std::fabs(term);
            add(want_v, size_v, dv.at(b, kv, j, d), prob * g, std::fabs(prob * g));
          }
          const double ds = c.scale * slope[j] * prob * (dp - row_delta);
          // Beside ds' own rounding, the fp32 sums in it: 2^-24 of its terms each, which cancel.
          const double ds_size =
              std::fabs(ds) + std::fabs(c.scale) * prob * (dp_size + std::fabs(row_delta)) * 1e-5 / p.rounding();
          for (int64_t d = 0; d < c.dk; ++d) {
            const double query = p.q(b, h, i, d), key = p.k(b, kv, j, d);
            add(want_q, size_q, dq.at(b, h, i, d), ds * key, ds_size * std::fabs(key));
            add(want_k, size_k, dk.at(b, kv, j, d), ds * query, ds_size * std::fabs(query));
          }
        }
      }

  AttentionBackward g = {};
  g.forward = p.forward();
  g.cols = p.layout.cols;
  g.d_o = d_o.get();
  g.d_o_strides = d_o.strides;
  g.dlse = c.dlse ? dlse.get() : nullptr;
  g.delta = delta.get();
  g.dq = dq.get();
  g.dk = dk.get();
  g.dv = dv.get();
  g.dq_strides = dq.strides;
  g.dk_strides = dk.strides;
  g.dv_strides = dv.strides;
  const cudaError_t error = launch(g, nullptr);
  if (error != cudaSuccess) {
    std::printf("FAIL %s: error %d\n", c.name, int(error));
    return false;
  }
  const auto compare = [&](const char* what, const Tensor4& got, const Sums& want, const Sums& size) {
    got.for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
      const int64_t at = got.at(b, h, i, d);
      errors.expect(what, b, h, i, d, got(b, h, i, d), want[at],
                    1.01 * p.rounding() * (size[at] + std::fabs(want[at])) + 1e-7);
    });
    errors.expect_gaps(what, got);
  };
  compare("dq", dq, want_q, size_q);
  compare("dk", dk, want_k, size_k);
  compare("dv", dv, want_v, size_v);
  return errors.none();
}

}  // namespace attention_check
