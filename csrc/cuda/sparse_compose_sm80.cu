// W = alpha B A + S in one pass for sm_80 and newer, bf16: the product of gemm_sm80.cuh, whose epilogue adds the
// entries of S to the tile before it leaves, so that W is written once and rounded once.
//
// Where S lies in a tile is found while the product's first copies are under way: a thread a row and edge of the tile,
// a binary search in the row's sorted columns (8 dependent reads for 205 entries, all threads at once). After the
// product the tile, still in shared memory, is cleared and S's entries are put in their places; the sums are then added
// to what they find there. Positions are unique: no atomics, the same bits every time.
#include "cuda/gemm_sm80.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

using namespace gemm_sm80;

// [begin, end) of the entries of each row of the tile.
struct RowRanges {
  int begin[kTileM], end[kTileM];
};
static_assert(kThreads == 2 * kTileM, "a thread a row and edge");

template <class Col>
struct AddSparse {
  static constexpr bool kFills = true;
  static constexpr size_t kSharedBytes = sizeof(RowRanges);
  static constexpr int kRowsAtOnce = 4;  // of a warp: their entries are read side by side, a row of a tile has few

  float alpha;
  const int32_t* crow;
  const Col* col;
  const __nv_bfloat16* values;

  // The first entry of row i whose column is at least `column`.
  __device__ int lower_bound(int64_t i, int64_t column) const {
    int low = crow[i], high = crow[i + 1];
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (int64_t(col[middle]) < column)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  __device__ void find(const GemmArgs& g, int64_t first_m, int64_t first_n, void* shared) const {
    RowRanges& ranges = *static_cast<RowRanges*>(shared);
    const int row = threadIdx.x % kTileM;
    const bool end = threadIdx.x >= kTileM;
    const int at = first_m + row < g.m ? lower_bound(first_m + row, end ? first_n + kTileN : first_n) : 0;
    (end ? ranges.end : ranges.begin)[row] = at;
  }

  __device__ void put(Chunk* tile, int row, int column, __nv_bfloat16 value) const {
    chunk_of(tile, row, column / kChunk).e[column % kChunk] = value;
  }

  __device__ void fill(const GemmArgs&, int64_t, int64_t first_n, Chunk* tile, const void* shared) const {
    const RowRanges& ranges = *static_cast<const RowRanges*>(shared);
    for (int at = threadIdx.x; at < kTileM * kChunksC; at += kThreads)
      *reinterpret_cast<uint4*>(&tile[at]) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    constexpr int kWarpRows = kTileM / (kThreads / 32);
    const int first = int(threadIdx.x) / 32 * kWarpRows;
    for (int row = first; row < first + kWarpRows; row += kRowsAtOnce) {
      int column[kRowsAtOnce];
      __nv_bfloat16 value[kRowsAtOnce];
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u) {
        const int k = ranges.begin[row + u] + lane;
        column[u] = -1;
        if (k < ranges.end[row + u]) {
          column[u] = int(col[k] - first_n);
          value[u] = values[k];
        }
      }
#pragma unroll
      for (int u = 0; u < kRowsAtOnce; ++u)
        if (column[u] >= 0) put(tile, row + u, column[u], value[u]);
      for (int u = 0; u < kRowsAtOnce; ++u)
        for (int k = ranges.begin[row + u] + 32 + lane; k < ranges.end[row + u]; k += 32)
          put(tile, row + u, int(col[k] - first_n), values[k]);
    }
  }

  __device__ float2 add(float2 sum, float2 sparse) const {
    return make_float2(fmaf(alpha, sum.x, sparse.x), fmaf(alpha, sum.y, sparse.y));
  }
};

}  // namespace

cudaError_t launch_compose_sm80(const GemmArgs& g, const Csr& s, const void* values, float alpha, cudaStream_t stream) {
  if (const cudaError_t error = check_gemm_args(g); error != cudaSuccess) return error;
  if (g.m != s.n || g.n != s.m) return cudaErrorInvalidValue;
  const auto run = [&](auto* col) {
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    return launch_with(g, AddSparse<Col>{alpha, s.crow, col, static_cast<const __nv_bfloat16*>(values)}, stream);
  };
  return s.col_is_16 ? run(static_cast<const int16_t*>(s.col)) : run(static_cast<const int32_t*>(s.col));
}

}  // namespace slk::cuda
