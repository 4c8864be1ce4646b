// W = alpha B A + S in one pass for sm_80 and newer, bf16: the product of gemm_sm80.cuh, whose epilogue adds the
// entries of S to the tile before it leaves, so that W is written once and rounded once.
//
// Where S lies in a tile is found while the product's first copies are under way: a thread a row and edge of the tile,
// a binary search in the row's sorted columns (8 dependent reads for 205 entries, all threads at once). After the
// product the tile, still in shared memory, is cleared and S's entries are put in their places; the sums are then added
// to what they find there. Positions are unique: no atomics, the same bits every time.
#include "cuda/gemm_sm80.cuh"
#include "cuda/sparse_rows.cuh"
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
struct AddSparse : Product {
  static constexpr bool kFills = true;
  static constexpr size_t kSharedBytes = sizeof(RowRanges);
  static constexpr int kRowsAtOnce = 4;

  float alpha;
  const int32_t* crow;
  const Col* col;
  const __nv_bfloat16* values;

  __device__ void find(const GemmArgs& g, int64_t first_m, int64_t first_n, void* shared) const {
    RowRanges& ranges = *static_cast<RowRanges*>(shared);
    const int row = threadIdx.x % kTileM;
    const bool end = threadIdx.x >= kTileM;
    const int64_t i = first_m + row, column = end ? first_n + kTileN : first_n;
    (end ? ranges.end : ranges.begin)[row] = i < g.m ? lower_bound(col, crow[i], crow[i + 1], column) : 0;
  }

  __device__ void fill(const GemmArgs&, int64_t, int64_t first_n, Vector<__nv_bfloat16>* tile,
                       const void* shared) const {
    const RowRanges& ranges = *static_cast<const RowRanges*>(shared);
    for (int at = threadIdx.x; at < kTileM * kChunksC; at += kThreads)
      *reinterpret_cast<uint4*>(&tile[at]) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    constexpr int kWarpRows = kTileM / (kThreads / 32);
    const int first = int(threadIdx.x) / 32 * kWarpRows;
    for_entries<kRowsAtOnce>(col, values, ranges.begin, ranges.end, first, kWarpRows, first_n,
                             [&](int row, int column, __nv_bfloat16 value) {
                               chunk_of(tile, row, column / kChunk).at[column % kChunk] = value;
                             });
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
    return launch_with(g, AddSparse<Col>{{}, alpha, s.crow, col, static_cast<const __nv_bfloat16*>(values)}, stream);
  };
  return s.col_is_16 ? run(static_cast<const int16_t*>(s.col)) : run(static_cast<const int32_t*>(s.col));
}

}  // namespace slk::cuda
