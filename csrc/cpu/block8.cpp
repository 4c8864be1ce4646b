// Products with 8x8 blocks on panels of tokens. Contract: slkernels/block8.h.
//
// spmm: a block is 8 x 8 x P multiply-adds. A load of x feeds 8 rows of S, whose values are broadcasts from L1 that an
// FMA takes as its memory operand: with two vectors of tokens 10 loads for 16 FMAs, so that the FMA units are the
// bound, where a nonzero of a CSR costs a load from L2 each.
#include "slkernels/block8.h"

#include "cpu/panel.h"
#include "cpu/simd.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

constexpr int kSide = 8, kBlock = kSide * kSide;

// Where S[i, j] of a block lies among its values.
template <bool kTransposed>
constexpr int at(int i, int j) {
  return kTransposed ? j * kSide + i : i * kSide + j;
}

template <class F>
SLK_INLINE void with_order(const Blocks& s, F f) {
  s.order ? f(std::true_type()) : f(std::false_type());
}
template <bool kTransposed>
SLK_INLINE int64_t block_of(const Blocks& s, int64_t k) {
  return kTransposed ? s.order[k] : k;
}

// ---- spmm -----------------------------------------------------------------------------------------------------------

// Vectors of tokens at a time: 8 rows of them are accumulators, which leaves room for the operands.
constexpr int kAtOnce = kLanes >= 16 ? 2 : 1;
// Blocks that are summed in one chain of 128 terms (of 8, where every term rounds twice); the chains are summed in
// turn. A single one over all of a row's blocks would round more often than a dense product, which sums in several.
constexpr int64_t kChain = kFusesProducts ? 16 : 1;

// yt[i][t] = sum_j S[i, j] xt[j, t] for the 8 rows of one block row.
template <bool kTransposed, int NV, class Col>
SLK_INLINE void block_row(const Blocks& s, const Col* col, int64_t begin, int64_t end, const float* values,
                          const float* xt, float* yt) {
  constexpr int kPanel = NV * kLanes, NB = kAtOnce < NV ? kAtOnce : NV;
  for (int first = 0; first < NV; first += NB) {
    float* out = yt + first * kLanes;
    for (int i = 0; i < kSide; ++i)
      for (int v = 0; v < NB; ++v) store(out + i * kPanel + v * kLanes, zero());
    for (int64_t chain = begin; chain < end; chain += kChain) {
      V acc[kSide][NB];
      for (int i = 0; i < kSide; ++i)
        for (int v = 0; v < NB; ++v) acc[i][v] = zero();
      for (int64_t k = chain; k < end && k < chain + kChain; ++k) {
        const float* w = values + block_of<kTransposed>(s, k) * kBlock;
        const float* x = xt + int64_t(col[k]) * kSide * kPanel + first * kLanes;
        for (int j = 0; j < kSide; ++j) {
          V xv[NB];
          for (int v = 0; v < NB; ++v) xv[v] = load(x + j * kPanel + v * kLanes);
          for (int i = 0; i < kSide; ++i) {
            const V a = broadcast(w[at<kTransposed>(i, j)]);
            for (int v = 0; v < NB; ++v) acc[i][v] += a * xv[v];
          }
        }
      }
      for (int i = 0; i < kSide; ++i)
        for (int v = 0; v < NB; ++v) {
          float* to = out + i * kPanel + v * kLanes;
          store(to, load(to) + acc[i][v]);
        }
    }
  }
}

template <bool kTransposed, int NV, class T, class Col>
void spmm_panel_t(const Blocks& s, const Col* col, const float* values, const float* xt, Range rows, const Matrix& y,
                  int64_t t0) {
  constexpr int kPanel = NV * kLanes, kHeight = kLanes > kSide ? kLanes : kSide;  // whole tiles of store_panel_rows
  const int tokens = int(y.rows - t0 < kPanel ? y.rows - t0 : kPanel);
  const int64_t limit = rows.end * kSide < y.cols ? rows.end * kSide : y.cols;
  T* base = static_cast<T*>(y.data) + t0 * y.ld;
  alignas(64) float yt[kHeight * kPanel];
  for (int64_t row = rows.begin; row < rows.end; row += kHeight / kSide) {
    for (int b = 0; b < kHeight / kSide && row + b < rows.end; ++b)
      block_row<kTransposed, NV>(s, col, s.grid.crow[row + b], s.grid.crow[row + b + 1], values, xt,
                                 yt + b * kSide * kPanel);
    for (int r = 0; r < kHeight; r += kLanes) {
      const int64_t i = row * kSide + r, left = limit - i;
      if (left > 0)
        store_panel_rows<kPanel>(yt + r * kPanel, int(left < kLanes ? left : kLanes), base + i, y.ld, tokens, false);
    }
  }
}

void spmm_panel(DType y_dtype, const Blocks& s, const float* values, const float* xt, int panel, Range rows,
                const Matrix& y, int64_t t0) {
  with_float_type(y_dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    with_col(s.grid, [&](auto* col) {
      with_order(s, [&](auto transposed) {
        switch (panel) {
          case 16:
            return spmm_panel_t<transposed, 16 / kLanes, T>(s, col, values, xt, rows, y, t0);
          case 32:
            return spmm_panel_t<transposed, 32 / kLanes, T>(s, col, values, xt, rows, y, t0);
          case 64:
            return spmm_panel_t<transposed, 64 / kLanes, T>(s, col, values, xt, rows, y, t0);
        }
      });
    });
  });
}

// ---- sddmm ----------------------------------------------------------------------------------------------------------

// kLanes entries of a block at a time, kRows rows of dy by kColumns of x; sum_rows leaves them side by side.
void sddmm_panel(const Csr& grid, const float* dyt, const float* xt, int panel, Range rows, float* acc) {
  constexpr int kRows = kLanes > kSide ? kLanes / kSide : 1, kColumns = kLanes / kRows;
  with_col(grid, [&](auto* col) {
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t k = grid.crow[row]; k < grid.crow[row + 1]; ++k) {
        const float* x = xt + int64_t(col[k]) * kSide * panel;
        for (int i = 0; i < kSide; i += kRows)
          for (int j = 0; j < kSide; j += kColumns) {
            V part[kLanes];
            for (int l = 0; l < kLanes; ++l) part[l] = zero();
            for (int t = 0; t < panel; t += kLanes) {
              V a[kRows];
              for (int r = 0; r < kRows; ++r) a[r] = load(dyt + (row * kSide + i + r) * panel + t);
              for (int c = 0; c < kColumns; ++c) {
                const V b = load(x + (j + c) * panel + t);
                for (int r = 0; r < kRows; ++r) part[r * kColumns + c] += a[r] * b;
              }
            }
            float* out = acc + k * kBlock + i * kSide + j;
            store(out, load(out) + sum_rows(part));
          }
      }
  });
}

// ---- fp64 -----------------------------------------------------------------------------------------------------------

// f(i, j) for the entries of the block at (row, column) that lie within [n, m].
template <class F>
void for_entries(int64_t row, int64_t column, int64_t n, int64_t m, F f) {
  for (int i = 0; i < kSide && row * kSide + i < n; ++i)
    for (int j = 0; j < kSide && column * kSide + j < m; ++j) f(i, j);
}

void spmm_f64(const Blocks& s, const double* values, const Matrix& x, const Matrix& y, Range tokens) {
  with_col(s.grid, [&](auto* col) {
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      const double* in = static_cast<const double*>(x.data) + t * x.ld;
      double* out = static_cast<double*>(y.data) + t * y.ld;
      for (int64_t i = 0; i < y.cols; ++i) out[i] = 0;
      for (int64_t row = 0; row < s.grid.n; ++row)
        for (int64_t k = s.grid.crow[row]; k < s.grid.crow[row + 1]; ++k) {
          const double* w = values + (s.order ? s.order[k] : k) * kBlock;
          const int64_t column = col[k];
          for_entries(row, column, y.cols, x.cols, [&](int i, int j) {
            out[row * kSide + i] += w[s.order ? at<true>(i, j) : at<false>(i, j)] * in[column * kSide + j];
          });
        }
    }
  });
}

void sddmm_f64(const Csr& grid, const Matrix& dy, const Matrix& x, Range rows, double* out) {
  with_col(grid, [&](auto* col) {
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t k = grid.crow[row]; k < grid.crow[row + 1]; ++k) {
        double* to = out + k * kBlock;
        for (int e = 0; e < kBlock; ++e) to[e] = 0;
        const int64_t column = col[k];
        for_entries(row, column, dy.cols, x.cols, [&](int i, int j) {
          const double* a = static_cast<const double*>(dy.data) + row * kSide + i;
          const double* b = static_cast<const double*>(x.data) + column * kSide + j;
          for (int64_t t = 0; t < x.rows; ++t) to[i * kSide + j] += a[t * dy.ld] * b[t * x.ld];
        });
      }
  });
}

}  // namespace

extern const Block8Kernels block8_table;
const Block8Kernels block8_table = {spmm_panel, sddmm_panel, spmm_f64, sddmm_f64};

}  // namespace slk::cpu::SLK_ISA
