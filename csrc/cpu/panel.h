// What products with a sparse matrix share: its columns' type, and the way of a panel's results into y.
#pragma once

#include "cpu/simd.h"
#include "slkernels/types.h"

namespace slk::cpu::SLK_ISA {

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
