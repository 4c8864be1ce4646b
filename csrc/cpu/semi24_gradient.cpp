// The gradients of y = x W^T with W 2:4. Contract: slkernels/semi24_linear.h; the panel kernels' plan: semi24_panel.h.
#include "cpu/semi24_panel.h"
#include "slkernels/semi24_linear.h"

namespace slk::cpu::SLK_ISA {
namespace {

// ---- dx = dy W ----------------------------------------------------------------------------------------------------
// W^T of a pruned W keeps any number of elements of four, so that its rows are lists. The lists are made once for all
// tokens; then a column of dx is the sum of the rows of a packed block of dy that its list names.

template <class T>
void column_lists_t(const Weight24& w, int64_t block, const ColumnLists24& lists) {
  const int64_t kept = kept24(w.m), bytes = ceil_div(kept, 4), width = lists.columns.size();
  const int64_t first = block * kDepth24, last = first + kDepth24 < w.n ? first + kDepth24 : w.n;
  const Range slots = {lists.columns.begin / 2, lists.columns.begin / 2 + kept24(width)};
  int32_t* start = lists.start + block * (width + 1);
  float* values = lists.values + block * kDepth24 * slots.size();
  uint8_t* rows = lists.rows + block * kDepth24 * slots.size();
  // f(row, slot, column of the slice) for every kept element; a padding column has none.
  const auto for_kept = [&](auto f) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t s = slots.begin; s < slots.end; ++s) {
        const int64_t column = s / 2 * 4 + (w.meta[i * bytes + s / 4] >> 2 * (s % 4) & 3) - lists.columns.begin;
        if (column < width) f(i, s, column);
      }
  };
  for (int64_t j = 0; j <= width; ++j) start[j] = 0;
  for_kept([&](int64_t, int64_t, int64_t column) { ++start[column + 1]; });
  for (int64_t j = 0; j < width; ++j) start[j + 1] += start[j];
  // Filling moves every start to its list's end, which is the next one's start.
  for_kept([&](int64_t i, int64_t s, int64_t column) {
    const int32_t at = start[column]++;
    values[at] = to_float(static_cast<const T*>(w.values)[i * kept + s]);
    rows[at] = uint8_t(i - first);
  });
  for (int64_t j = width; j > 0; --j) start[j] = start[j - 1];
  start[0] = 0;
}

template <int NV, class T>
void grad_x_panel(const ColumnLists24& lists, const Matrix& dy, Range columns, Range tokens, const Matrix& dx,
                  float* scratch) {
  constexpr int kPanel = NV * kLanes;
  const int64_t width = lists.columns.size(), slots = kDepth24 * kept24(width);
  float *dyt = scratch, *dxt = dyt + kDepth24 * kPanel;
  for (int64_t i = 0; i < columns.size() * kPanel; i += kLanes) store(dxt + i, zero());
  for (int64_t k = 0; k < dy.cols; k += kDepth24) {
    pack_block<NV, T>(dy, tokens, k, dy.cols - k < kDepth24 ? dy.cols - k : kDepth24, dyt);
    const int64_t block = k / kDepth24;
    const int32_t* start = lists.start + block * (width + 1) - lists.columns.begin;
    const float* values = lists.values + block * slots;
    const uint8_t* rows = lists.rows + block * slots;
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      V acc[NV];
      for (int v = 0; v < NV; ++v) acc[v] = zero();
      for (int32_t at = start[j]; at < start[j + 1]; ++at) {
        const V value = broadcast(values[at]);
        const float* row = dyt + rows[at] * kPanel;
        for (int v = 0; v < NV; ++v) acc[v] += value * load(row + v * kLanes);
      }
      float* out = dxt + (j - columns.begin) * kPanel;
      for (int v = 0; v < NV; ++v) store(out + v * kLanes, load(out + v * kLanes) + acc[v]);
    }
  }
  store_panel<NV, T>(dxt, nullptr, Activation24::none, columns, tokens, dx);
}

// ---- dvalues = dy^T x at the kept slots ---------------------------------------------------------------------------
// Tokens run along the lanes here too: a kept slot is a dot product over a panel of tokens, one load an FMA, and
// kLanes of them are reduced together. The sums of the panels are added in a tile of accumulators.

// As many vectors of dy as fit beside kLanes partial sums.
constexpr int kGradVectors = kLanes == 8 ? 6 : 8;

// Adds to acc[0..count): slots of one row whose groups' features start at xt.
template <int NV>
SLK_INLINE void dot_kept(const V (&dy)[NV], const uint8_t* meta, int count, const float* xt, float* acc) {
  constexpr int kPanel = NV * kLanes;
  const auto column = [&](int s) { return xt + (s / 2 * 4 + (meta[s / 4] >> 2 * (s % 4) & 3)) * kPanel; };
  const auto dot = [&](const float* x) {
    V part = dy[0] * load(x);
    for (int v = 1; v < NV; ++v) part += dy[v] * load(x + v * kLanes);
    return part;
  };
  int s = 0;
  for (; s + kLanes <= count; s += kLanes) {
    V part[kLanes];
    for (int l = 0; l < kLanes; ++l) part[l] = dot(column(s + l));
    store(acc + s, load(acc + s) + sum_rows(part));
  }
  if (s < count) {
    V part[kLanes];
    for (int l = 0; l < kLanes; ++l) part[l] = s + l < count ? dot(column(s + l)) : zero();
    store_n(acc + s, load_n(acc + s, count - s) + sum_rows(part), count - s);
  }
}

template <int NV, class T>
void grad_w_panels(const Weight24& w, const Matrix& dy, const Matrix& x, Range rows, Range columns, T* dvalues,
                   float* scratch) {
  constexpr int kPanel = NV * kLanes;
  const int64_t kept = kept24(w.m), bytes = ceil_div(kept, 4), slots = kept24(columns.size());
  float *xt = scratch, *dyt = xt + kDepth24 * kPanel, *acc = dyt + rows.size() * kPanel;
  for (int64_t i = 0; i < rows.size() * slots; ++i) acc[i] = 0;
  const Matrix some_dy = {static_cast<T*>(dy.data) + rows.begin, dy.rows, rows.size(), dy.ld};
  for (int64_t t = 0; t < x.rows; t += kPanel) {
    pack_panel_t<T>(some_dy, t, kPanel, {0, rows.size()}, dyt);
    for (int64_t k = columns.begin; k < columns.end; k += kDepth24) {
      const int64_t depth = columns.end - k < kDepth24 ? columns.end - k : kDepth24;
      pack_block<NV, T>(x, {t, x.rows}, k, depth, xt);
      for (int64_t i = 0; i < rows.size(); ++i) {
        V row[NV];
        for (int v = 0; v < NV; ++v) row[v] = load(dyt + i * kPanel + v * kLanes);
        dot_kept<NV>(row, w.meta + (rows.begin + i) * bytes + k / 8, int(kept24(depth)), xt,
                     acc + i * slots + (k - columns.begin) / 2);
      }
    }
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    T* out = dvalues + (rows.begin + i) * kept + columns.begin / 2;
    int64_t s = 0;
    for (; s + kLanes <= slots; s += kLanes) store(out + s, load(acc + i * slots + s));
    if (s < slots) store_n(out + s, load_n(acc + i * slots + s, int(slots - s)), int(slots - s));
  }
}

}  // namespace

void column_lists(DType dtype, const Weight24& w, Range blocks, const ColumnLists24& lists) {
  with_float_type(dtype, [&](auto* type) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) column_lists_t<Element<decltype(type)>>(w, b, lists);
  });
}

void grad_x(DType dtype, const ColumnLists24& lists, const Matrix& dy, Range columns, Range tokens, const Matrix& dx,
            float* scratch) {
  with_float_type(dtype, [&](auto* type) {
    for_panels(tokens, [&](auto vectors, Range panel) {
      grad_x_panel<vectors, Element<decltype(type)>>(lists, dy, columns, panel, dx, scratch);
    });
  });
}

void grad_w(DType dtype, const Weight24& w, const Matrix& dy, const Matrix& x, Range rows, Range columns, void* dvalues,
            float* scratch) {
  with_float_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const auto run = [&](auto vectors) {
      grad_w_panels<vectors>(w, dy, x, rows, columns, static_cast<T*>(dvalues), scratch);
    };
    if (x.rows <= kLanes)
      run(std::integral_constant<int, 1>());
    else if (x.rows <= 3 * kLanes)
      run(std::integral_constant<int, 3>());
    else
      run(std::integral_constant<int, kGradVectors>());
  });
}

}  // namespace slk::cpu::SLK_ISA
