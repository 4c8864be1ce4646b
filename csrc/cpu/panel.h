// Panels of tokens, transposed: what the kernels multiply whose vectors run along tokens; and what products with a
// sparse matrix share: its columns' type, and the way of a panel's results into y.
#pragma once

#include "cpu/simd.h"
#include "slkernels/sparse.h"

namespace slk::cpu::SLK_ISA {

// xt[j * panel + t] = x[t0 + t, j] for j in `cols`; zero where t0 + t >= x.rows.
// kLanes tokens at a time along their features: as many read streams as a hardware prefetcher can follow.
template <class T>
void pack_panel_t(const Matrix& x, int64_t t0, int panel, Range cols, float* xt) {
  const int tokens = int(x.rows - t0 < panel ? x.rows - t0 : panel);
  for (int t = 0; t < panel; t += kLanes) {
    const T* base = static_cast<const T*>(x.data) + (t0 + t) * x.ld;
    const int depth = tokens - t < kLanes ? tokens - t : kLanes;
    for (int64_t j = cols.begin; j < cols.end; j += kLanes) {
      const int width = int(cols.end - j < kLanes ? cols.end - j : kLanes);
      V tile[kLanes];
      if (width == kLanes && depth == kLanes) {
        for (int i = 0; i < kLanes; ++i) tile[i] = load(base + i * x.ld + j);
      } else {
        for (int i = 0; i < kLanes; ++i) tile[i] = i < depth ? load_n(base + i * x.ld + j, width) : zero();
      }
      transpose(tile);
      if (width == kLanes) {
        for (int i = 0; i < kLanes; ++i) store(xt + (j + i) * panel + t, tile[i]);
      } else {
        for (int i = 0; i < width; ++i) store(xt + (j + i) * panel + t, tile[i]);
      }
    }
  }
}

template <class F>
void with_col(const Csr& s, F f) {
  if (s.col_is_16)
    f(static_cast<const int16_t*>(s.col));
  else
    f(static_cast<const int32_t*>(s.col));
}

// y[t, i] (+)= yt[i][t] for the first `height` of kLanes rows i, and the first `tokens` of kPanel tokens.
template <int kPanel, class T>
void store_panel_rows(const float* yt, int height, T* y, int64_t ld, int tokens, bool accumulate) {
  for (int t = 0; t < tokens; t += kLanes) {
    V tile[kLanes];
    for (int r = 0; r < kLanes; ++r) tile[r] = load(yt + r * kPanel + t);
    transpose(tile);
    T* out = y + t * ld;
    const int depth = tokens - t < kLanes ? tokens - t : kLanes;
    if (height == kLanes && depth == kLanes) {
      if (accumulate)
        for (int u = 0; u < kLanes; ++u) store(out + u * ld, load(out + u * ld) + tile[u]);
      else
        for (int u = 0; u < kLanes; ++u) store(out + u * ld, tile[u]);
    } else {
      for (int u = 0; u < depth; ++u)
        store_n(out + u * ld, accumulate ? load_n(out + u * ld, height) + tile[u] : tile[u], height);
    }
  }
}

}  // namespace slk::cpu::SLK_ISA
