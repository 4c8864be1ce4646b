// y = act(x W^T + bias) with W 2:4. Contract: slkernels/semi24_linear.h; the panel kernels' plan: semi24_panel.h.
#include "slkernels/semi24_linear.h"

#include "cpu/semi24_panel.h"

namespace slk::cpu::SLK_ISA {

// Of semi24_gradient.cpp.
void column_lists(DType, const Weight24&, Range blocks, const ColumnLists24&);
void grad_x(DType, const ColumnLists24&, const Matrix& dy, Range columns, Range tokens, const Matrix& dx, float*);
void grad_w(DType, const Weight24&, const Matrix& dy, const Matrix& x, Range rows, Range columns, void*, float*);

namespace {

SLK_INLINE const float* as_floats(const float* values, int, float*) {
  return values;
}
template <class T>
SLK_INLINE const float* as_floats(const T* values, int count, float* buffer) {
  int k = 0;
  for (; k + kLanes <= count; k += kLanes) store(buffer + k, load(values + k));
  if (k < count) store(buffer + k, load_n(values + k, count - k));
  return buffer;
}

// ---- many tokens --------------------------------------------------------------------------------------------------

// The two kept elements of a group whose four features start at xt; code as in semi24.h.
template <int NV>
SLK_INLINE void add_group(const float* values, uint32_t code, const float* xt, V (&acc)[NV]) {
  constexpr int kPanel = NV * kLanes;
  for (int s = 0; s < 2; ++s) {
    const V value = broadcast(values[s]);
    const float* row = xt + (code >> 2 * s & 3) * kPanel;
    for (int v = 0; v < NV; ++v) acc[v] += value * load(row + v * kLanes);
  }
}

// yt (+)= NR rows of W, from `row`, times a block of `groups` groups of features from feature k. NR > 1 where a single
// row's NV chains would wait for themselves.
template <int NV, int NR, class T>
SLK_INLINE void add_rows(const Weight24& w, int64_t row, int64_t k, int groups, const float* xt, float* yt) {
  constexpr int kPanel = NV * kLanes;
  const int64_t kept = kept24(w.m), bytes = ceil_div(kept, 4);
  const uint8_t* meta = w.meta + row * bytes + k / 8;
  const T* values = static_cast<const T*>(w.values) + row * kept + k / 2;
  float buffer[NR][kDepth24 / 2];
  const float* floats[NR];
  V acc[NR][NV];
  for (int r = 0; r < NR; ++r) {
    floats[r] = as_floats(values + r * kept, 2 * groups, buffer[r]);
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  }
  int g = 0;
  for (; g + 2 <= groups; g += 2) {
    for (int r = 0; r < NR; ++r) {
      const uint32_t code = meta[r * bytes + g / 2];
      add_group<NV>(floats[r] + 2 * g, code, xt + 4 * g * kPanel, acc[r]);
      add_group<NV>(floats[r] + 2 * g + 2, code >> 4, xt + (4 * g + 4) * kPanel, acc[r]);
    }
  }
  if (g < groups)
    for (int r = 0; r < NR; ++r) add_group<NV>(floats[r] + 2 * g, meta[r * bytes + g / 2], xt + 4 * g * kPanel, acc[r]);
  for (int r = 0; r < NR; ++r) {
    float* out = yt + r * kPanel;
    for (int v = 0; v < NV; ++v) store(out + v * kLanes, k ? load(out + v * kLanes) + acc[r][v] : acc[r][v]);
  }
}

// Rows of a block lie a row of W apart, too far for a hardware prefetcher.
template <int NR, class T>
SLK_INLINE void prefetch_rows(const Weight24& w, int64_t row, int64_t k) {
  const int64_t kept = kept24(w.m);
  for (int64_t r = row; r < row + NR && r < w.n; ++r) {
    const char* values = reinterpret_cast<const char*>(static_cast<const T*>(w.values) + r * kept + k / 2);
    for (int at = 0; at <= int(kDepth24 / 2 * sizeof(T)); at += 64) __builtin_prefetch(values + at);
    __builtin_prefetch(w.meta + r * ceil_div(kept, 4) + k / 8);
  }
}

template <int NV, class T>
void linear_panel(const Weight24& w, const Matrix& x, const T* bias, Activation24 f, Range rows, Range tokens,
                  const Matrix& y, float* scratch) {
  constexpr int kPanel = NV * kLanes, kRows = NV >= 5 ? 1 : NV >= 3 ? 2 : 4;
  float *xt = scratch, *yt = xt + kDepth24 * kPanel;
  for (int64_t i = 0; i < (w.m ? 0 : rows.size() * kPanel); i += kLanes) store(yt + i, zero());  // empty sums
  for (int64_t k = 0; k < w.m; k += kDepth24) {
    const int64_t depth = w.m - k < kDepth24 ? w.m - k : kDepth24;
    pack_block<NV, T>(x, tokens, k, depth, xt);
    const int groups = int(groups24(depth));
    int64_t i = rows.begin;
    for (; i + kRows <= rows.end; i += kRows) {
      prefetch_rows<kRows, T>(w, i + 2 * kRows, k);
      add_rows<NV, kRows, T>(w, i, k, groups, xt, yt + (i - rows.begin) * kPanel);
    }
    for (; i < rows.end; ++i) add_rows<NV, 1, T>(w, i, k, groups, xt, yt + (i - rows.begin) * kPanel);
  }
  store_panel<NV>(yt, bias, f, rows, tokens, y);
}

void linear(DType dtype, const Weight24& w, const Matrix& x, const void* bias, Activation24 f, Range rows, Range tokens,
            const Matrix& y, float* scratch) {
  with_float_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    for_panels(tokens, [&](auto vectors, Range panel) {
      linear_panel<vectors, T>(w, x, static_cast<const T*>(bias), f, rows, panel, y, scratch);
    });
  });
}

// ---- few tokens ---------------------------------------------------------------------------------------------------

// NR rows of W by NT tokens along their features, out[t * kLanes + r]. The bound is reading W once from memory: a step
// of kLanes kept elements is 68 bytes in fp32 and 36 in bf16 on AVX-512, against some 8 instructions.
template <int NR, int NT, class T>
SLK_INLINE void dot_rows(const Weight24& w, int64_t row, const float* x, int64_t ldx, float* out) {
  const int64_t kept = kept24(w.m), bytes = ceil_div(kept, 4);
  const T* values = static_cast<const T*>(w.values) + row * kept;
  const uint8_t* meta = w.meta + row * bytes;
  V acc[NR][NT];
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) acc[r][t] = zero();
  const auto step = [&](int r, int64_t k, V value, const uint8_t* codes) {
    const VI lanes = kept_lanes(codes);
    for (int t = 0; t < NT; ++t) {
      const float* in = x + t * ldx + 2 * k;
      acc[r][t] += value * pick_kept(load(in), load(in + kLanes), lanes);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= kept; k += kLanes)
    for (int r = 0; r < NR; ++r) step(r, k, load(values + r * kept + k), meta + r * bytes + k / 4);
  if (k < kept) {
    for (int r = 0; r < NR; ++r) {
      uint8_t codes[kLanes / 4] = {};
      for (int64_t b = k / 4; b < bytes; ++b) codes[b - k / 4] = meta[r * bytes + b];
      step(r, k, load_n(values + r * kept + k, int(kept - k)), codes);
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int t = 0; t < NT; ++t) out[t * kLanes + r] = sum(acc[r][t]);
}

template <int NT, class T>
void few_tokens(const Weight24& w, const Matrix& x, int64_t t0, const T* bias, Activation24 f, Range rows,
                const Matrix& y) {
  constexpr int kRows = 4;
  const float* in = static_cast<const float*>(x.data) + t0 * x.ld;
  for (int64_t i = rows.begin; i < rows.end; i += kLanes) {
    const int height = int(rows.end - i < kLanes ? rows.end - i : kLanes);
    float out[NT * kLanes] = {};
    int r = 0;
    for (; r + kRows <= height; r += kRows) dot_rows<kRows, NT, T>(w, i + r, in, x.ld, out + r);
    for (; r < height; ++r) dot_rows<1, NT, T>(w, i + r, in, x.ld, out + r);
    const V offset = bias ? load_n(bias + i, height) : zero();
    for (int t = 0; t < NT; ++t)
      store_n(static_cast<T*>(y.data) + (t0 + t) * y.ld + i, activate(f, load(out + t * kLanes) + offset), height);
  }
}

void linear_few(DType dtype, const Weight24& w, const Matrix& x, const void* bias, Activation24 f, Range rows,
                const Matrix& y) {
  constexpr int64_t kRowBlock = 64;  // rows of W that stay in L2 while the next tokens use them
  with_float_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* offset = static_cast<const T*>(bias);
    for (int64_t first = rows.begin; first < rows.end; first += kRowBlock) {
      const Range block = {first, first + kRowBlock < rows.end ? first + kRowBlock : rows.end};
      int64_t t = 0;
      for (; t + 4 <= x.rows; t += 4) few_tokens<4>(w, x, t, offset, f, block, y);
      for (; t + 2 <= x.rows; t += 2) few_tokens<2>(w, x, t, offset, f, block, y);
      for (; t < x.rows; ++t) few_tokens<1>(w, x, t, offset, f, block, y);
    }
  });
}

}  // namespace

extern const Semi24LinearKernels semi24_linear_table;
const Semi24LinearKernels semi24_linear_table = {linear, linear_few, column_lists, grad_x, grad_w};

}  // namespace slk::cpu::SLK_ISA
