// Panels of tokens, transposed: what the kernels multiply whose vectors run along tokens.
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

}  // namespace slk::cpu::SLK_ISA
