// SpMM and SDDMM with a random support, blocked for the L2 cache. Contracts: slkernels/sparse.h.
//
// Cost of a panel of P tokens, per nonzero: one index, one broadcast, P/lanes FMAs with a load each from the packed
// panel, which is m * P * 4 bytes and lives in L2. A random support reuses nothing in L1, so the bound is L2 bandwidth:
// 4 P bytes a nonzero.
#include "slkernels/sparse.h"

#include "cpu/panel.h"
#include "cpu/simd.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

template <class F>
void with_col(const Csr& s, F f) {
  if (s.col_is_16)
    f(static_cast<const int16_t*>(s.col));
  else
    f(static_cast<const int32_t*>(s.col));
}
void pack_panel(DType dtype, const Matrix& x, int64_t t0, int panel, Range cols, float* xt) {
  with_float_type(dtype, [&](auto* type) { pack_panel_t<Element<decltype(type)>>(x, t0, panel, cols, xt); });
}

// ---- spmm ---------------------------------------------------------------------------------------------------------

// One row of S times a panel: NV vectors of tokens. Two nonzeros at a time into separate accumulators, because an FMA
// takes 4 cycles and one nonzero alone would leave a core with two FMA ports waiting.
template <int NV, class Col>
SLK_INLINE void spmm_row(const float* values, const Col* col, int64_t begin, int64_t end, const float* xt,
                         V (&acc)[NV]) {
  constexpr int kPanel = NV * kLanes;
  V odd[NV];
  for (int v = 0; v < NV; ++v) acc[v] = odd[v] = zero();
  int64_t k = begin;
  for (; k + 2 <= end; k += 2) {
    const V a = broadcast(values[k]), b = broadcast(values[k + 1]);
    const float* xa = xt + int64_t(col[k]) * kPanel;
    const float* xb = xt + int64_t(col[k + 1]) * kPanel;
    for (int v = 0; v < NV; ++v) acc[v] += a * load(xa + v * kLanes);
    for (int v = 0; v < NV; ++v) odd[v] += b * load(xb + v * kLanes);
  }
  if (k < end) {
    const V a = broadcast(values[k]);
    const float* xa = xt + int64_t(col[k]) * kPanel;
    for (int v = 0; v < NV; ++v) acc[v] += a * load(xa + v * kLanes);
  }
  for (int v = 0; v < NV; ++v) acc[v] += odd[v];
}

// kLanes rows of S at a time go to a small buffer yt[row][token], which is transposed into y.
template <int NV, class T, class Col>
void spmm_panel_t(const Csr& s, const Col* col, const float* values, const float* xt, Range rows, const Matrix& y,
                  int64_t t0, bool accumulate) {
  constexpr int kPanel = NV * kLanes;
  const int tokens = int(y.rows - t0 < kPanel ? y.rows - t0 : kPanel);
  T* base = static_cast<T*>(y.data) + t0 * y.ld;
  alignas(64) float yt[kLanes * kPanel];
  for (int64_t i = rows.begin; i < rows.end; i += kLanes) {
    const int height = int(rows.end - i < kLanes ? rows.end - i : kLanes);
    // The tile of y that this block ends in: `tokens` separate lines, which arrive while the rows are summed.
    for (int t = 0; t < tokens; ++t) __builtin_prefetch(base + t * y.ld + i, 1);
    for (int r = 0; r < height; ++r) {
      V acc[NV];
      spmm_row<NV>(values, col, s.crow[i + r], s.crow[i + r + 1], xt, acc);
      for (int v = 0; v < NV; ++v) store(yt + r * kPanel + v * kLanes, acc[v]);
    }
    for (int r = height; r < kLanes; ++r)
      for (int v = 0; v < NV; ++v) store(yt + r * kPanel + v * kLanes, zero());
    for (int t = 0; t < tokens; t += kLanes) {
      V tile[kLanes];
      for (int r = 0; r < kLanes; ++r) tile[r] = load(yt + r * kPanel + t);
      transpose(tile);
      T* out = base + t * y.ld + i;
      const int depth = tokens - t < kLanes ? tokens - t : kLanes;
      if (height == kLanes && depth == kLanes) {
        if (accumulate)
          for (int u = 0; u < kLanes; ++u) store(out + u * y.ld, load(out + u * y.ld) + tile[u]);
        else
          for (int u = 0; u < kLanes; ++u) store(out + u * y.ld, tile[u]);
      } else {
        for (int u = 0; u < depth; ++u)
          store_n(out + u * y.ld, accumulate ? load_n(out + u * y.ld, height) + tile[u] : tile[u], height);
      }
    }
  }
}

void spmm_panel(DType y_dtype, const Csr& s, const float* values, const float* xt, int panel, Range rows,
                const Matrix& y, int64_t t0, bool accumulate) {
  with_float_type(y_dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    with_col(s, [&](auto* col) {
      switch (panel) {
        case 16:
          return spmm_panel_t<16 / kLanes, T>(s, col, values, xt, rows, y, t0, accumulate);
        case 32:
          return spmm_panel_t<32 / kLanes, T>(s, col, values, xt, rows, y, t0, accumulate);
        case 64:
          return spmm_panel_t<64 / kLanes, T>(s, col, values, xt, rows, y, t0, accumulate);
      }
    });
  });
}

void spmv(DType y_dtype, const Csr& s, const float* values, const float* x, Range rows, void* y, bool accumulate) {
  with_float_type(y_dtype, [&](auto* type) {
    auto* out = static_cast<decltype(type)>(y);
    with_col(s, [&](auto* col) {
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        V acc = zero();
        int64_t k = s.crow[i];
        const int64_t end = s.crow[i + 1];
        for (; k + kLanes <= end; k += kLanes) acc += load(values + k) * gather(x, col + k);
        float total = sum(acc);
        for (; k < end; ++k) total += values[k] * x[col[k]];
        from_float(accumulate ? to_float(out[i]) + total : total, out[i]);
      }
    });
  });
}

// ---- sddmm --------------------------------------------------------------------------------------------------------

// A row of dy stays in NV registers; kLanes nonzeros at a time leave kLanes vectors of partial sums, which one
// transpose turns into kLanes results.
template <int NV, class Col>
void sddmm_panel_t(const Csr& s, const Col* col, const float* dyt, const float* xt, Range rows, float* acc) {
  constexpr int kPanel = NV * kLanes;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    V dy[NV];
    for (int v = 0; v < NV; ++v) dy[v] = load(dyt + i * kPanel + v * kLanes);
    const int64_t end = s.crow[i + 1];
    for (int64_t k = s.crow[i]; k < end; k += kLanes) {
      const int width = int(end - k < kLanes ? end - k : kLanes);
      V part[kLanes];
      if (width == kLanes) {
        for (int l = 0; l < kLanes; ++l) {
          const float* x = xt + int64_t(col[k + l]) * kPanel;
          part[l] = dy[0] * load(x);
          for (int v = 1; v < NV; ++v) part[l] += dy[v] * load(x + v * kLanes);
        }
        store(acc + k, load(acc + k) + sum_rows(part));
      } else {
        for (int l = 0; l < kLanes; ++l) {
          const float* x = xt + int64_t(col[k + (l < width ? l : 0)]) * kPanel;
          part[l] = dy[0] * load(x);
          for (int v = 1; v < NV; ++v) part[l] += dy[v] * load(x + v * kLanes);
        }
        store_n(acc + k, load_n(acc + k, width) + sum_rows(part), width);
      }
    }
  }
}

void sddmm_panel(const Csr& s, const float* dyt, const float* xt, int panel, Range rows, float* acc) {
  with_col(s, [&](auto* col) {
    switch (panel) {
      case 16:
        return sddmm_panel_t<16 / kLanes>(s, col, dyt, xt, rows, acc);
      case 32:
        return sddmm_panel_t<32 / kLanes>(s, col, dyt, xt, rows, acc);
      case 64:
        return sddmm_panel_t<64 / kLanes>(s, col, dyt, xt, rows, acc);
    }
  });
}

// ---- fp64 ---------------------------------------------------------------------------------------------------------

void spmm_f64(const Csr& s, const double* values, const Matrix& x, const Matrix& y, Range tokens, bool accumulate) {
  with_col(s, [&](auto* col) {
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      const double* in = static_cast<const double*>(x.data) + t * x.ld;
      double* out = static_cast<double*>(y.data) + t * y.ld;
      for (int64_t i = 0; i < s.n; ++i) {
        double total = accumulate ? out[i] : 0;
        for (int64_t k = s.crow[i]; k < s.crow[i + 1]; ++k) total += values[k] * in[col[k]];
        out[i] = total;
      }
    }
  });
}

void sddmm_f64(const Csr& s, const Matrix& dy, const Matrix& x, Range rows, double* out) {
  with_col(s, [&](auto* col) {
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t k = s.crow[i]; k < s.crow[i + 1]; ++k) {
        double total = 0;
        for (int64_t t = 0; t < x.rows; ++t)
          total += static_cast<const double*>(dy.data)[t * dy.ld + i] *
                   static_cast<const double*>(x.data)[t * x.ld + col[k]];
        out[k] = total;
      }
  });
}

// ---- dense W at the support ---------------------------------------------------------------------------------------

void gather_support(DType dtype, const Csr& s, const void* w, int64_t ld, Range rows, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    with_col(s, [&](auto* col) {
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t k = s.crow[i]; k < s.crow[i + 1]; ++k)
          static_cast<T*>(out)[k] = static_cast<const T*>(w)[i * ld + col[k]];
    });
  });
}

SLK_INLINE void add_to(double& w, double v) {
  w += v;
}
template <class T>
SLK_INLINE void add_to(T& w, T v) {
  from_float(to_float(w) + to_float(v), w);
}

void scatter_add(DType dtype, const Csr& s, const void* values, void* w, int64_t ld, Range rows) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    with_col(s, [&](auto* col) {
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t k = s.crow[i]; k < s.crow[i + 1]; ++k)
          add_to(static_cast<T*>(w)[i * ld + col[k]], static_cast<const T*>(values)[k]);
    });
  });
}

void to_f32(DType dtype, const void* in, float* out, Range range) {
  with_float_type(dtype, [&](auto* type) {
    auto* p = static_cast<const Element<decltype(type)>*>(in);
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) store(out + i, load(p + i));
    if (i < range.end) store_n(out + i, load_n(p + i, int(range.end - i)), int(range.end - i));
  });
}

void from_f32(DType dtype, const float* in, void* out, Range range) {
  with_float_type(dtype, [&](auto* type) {
    auto* p = static_cast<Element<decltype(type)>*>(out);
    int64_t i = range.begin;
    for (; i + kLanes <= range.end; i += kLanes) store(p + i, load(in + i));
    if (i < range.end) store_n(p + i, load_n(in + i, int(range.end - i)), int(range.end - i));
  });
}

}  // namespace

extern const SparseKernels sparse_table;
const SparseKernels sparse_table = {pack_panel, spmm_panel,     spmv,        sddmm_panel, spmm_f64,
                                    sddmm_f64,  gather_support, scatter_add, to_f32,      from_f32};

}  // namespace slk::cpu::SLK_ISA
