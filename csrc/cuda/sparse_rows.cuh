// Where the entries of a CSR lie within a tile of its matrix.
#pragma once

#include "slkernels/types.h"

namespace slk::cuda {

// The first entry of [low, high), a row's sorted columns, whose column is at least `column`.
template <class Col>
__device__ int lower_bound(const Col* col, int low, int high, int64_t column) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (int64_t(col[middle]) < column)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// f(row of the tile, column of the tile, k) for the entries [begin[r], end[r]) of rows [first, first + rows), by one
// warp, a lane an entry. kAtOnce rows' entries are read side by side: a row of a tile has few, and each read waits
// long.
template <int kAtOnce, class Col, class Value, class F>
__device__ void for_entries(const Col* col, const Value* values, const int* begin, const int* end, int first, int rows,
                            int64_t first_column, F f) {
  const int lane = threadIdx.x % 32;
  for (int row = first; row < first + rows; row += kAtOnce) {
    int column[kAtOnce];
    Value value[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      column[u] = -1;
      const int k = row + u < first + rows ? begin[row + u] + lane : 0;
      if (row + u < first + rows && k < end[row + u]) {
        column[u] = int(col[k] - first_column);
        value[u] = values[k];
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (column[u] >= 0) f(row + u, column[u], value[u]);
    for (int u = 0; u < kAtOnce && row + u < first + rows; ++u)  // rows with more than 32 entries here
      for (int k = begin[row + u] + 32 + lane; k < end[row + u]; k += 32)
        f(row + u, int(col[k] - first_column), values[k]);
  }
}

}  // namespace slk::cuda
