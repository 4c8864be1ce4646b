// CSR of S^T on the device: crow_t [m + 1], row_t and values_t [nnz], rows of S in order within a column.
//
// A counting sort whose result needs no sorting afterwards and no atomics. Rows of S are cut into chunks of kChunk; one
// warp walks a chunk row by row, and since the columns of a row are distinct, its lanes never meet.
//
//   count   a warp a chunk: counts[j][chunk] = nonzeros of the chunk in column j
//   prefix  a warp a column: counts[j][.] becomes its exclusive prefix sum, crow_t[j + 1] the column's total
//   scan    one block: crow_t = prefix sum
//   fill    a warp a chunk: row_t[crow_t[j] + counts[j][chunk]++] = row
//
// counts is the scratch: m * ceil(n / kChunk) int32, 4 MB for 4096 x 4096.
#include "cuda/scan.cuh"
#include "cuda/types.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
// Rows a warp: few enough that a square layer of 4096 gives two warps a multiprocessor, many enough that counts is
// small.
constexpr int kChunk = 16;

int64_t chunks_of(const Csr& s) {
  return ceil_div(s.n, kChunk);
}

// f(k, column of k, row) for the nonzeros of the chunk, with the warp in step between rows.
template <class Col, class F>
__device__ void for_chunk(const int32_t* crow, const Col* col, int64_t n, F f) {
  const int64_t first = int64_t(blockIdx.x) * kChunk;
  for (int64_t i = first; i < first + kChunk && i < n; ++i) {
    const int end = crow[i + 1];
    for (int k = crow[i] + int(threadIdx.x); k < end; k += 32) f(k, int64_t(col[k]), i);
    __syncwarp();  // the next row may count in the same column on another lane
  }
}

template <class Col>
__global__ void count_kernel(const int32_t* crow, const Col* col, int64_t n, int64_t chunks, int32_t* counts) {
  for_chunk(crow, col, n, [&](int, int64_t j, int64_t) { ++counts[j * chunks + blockIdx.x]; });
}

__global__ void prefix_kernel(int64_t chunks, int32_t* counts, int32_t* crow_t) {
  const int lane = threadIdx.x;
  int32_t* mine = counts + int64_t(blockIdx.x) * chunks;
  int carry = 0;
  for (int64_t first = 0; first < chunks; first += 32) {
    const int count = first + lane < chunks ? mine[first + lane] : 0;
    int inclusive = count;
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    if (first + lane < chunks) mine[first + lane] = carry + inclusive - count;
    carry += __shfl_sync(kAllLanes, inclusive, 31);
  }
  if (lane == 0) crow_t[int64_t(blockIdx.x) + 1] = carry;
}

template <class T, class Col, class Row>
__global__ void fill_kernel(const int32_t* crow, const Col* col, const T* values, int64_t n, int64_t chunks,
                            int32_t* counts, const int32_t* crow_t, Row* row_t, T* values_t) {
  for_chunk(crow, col, n, [&](int k, int64_t j, int64_t i) {
    const int slot = crow_t[j] + counts[j * chunks + blockIdx.x]++;
    row_t[slot] = Row(i);
    values_t[slot] = values[k];
  });
}

}  // namespace

int64_t transpose_scratch(const Csr& s) {
  return s.m * chunks_of(s);
}

cudaError_t launch_transpose_csr(DType dtype, const Csr& s, const void* values, int32_t* crow_t, void* row_t,
                                 void* values_t, int32_t* scratch, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(crow_t, 0, (s.m + 1) * sizeof(int32_t), stream);
  if (error != cudaSuccess || s.nnz == 0) return error;
  error = cudaMemsetAsync(scratch, 0, transpose_scratch(s) * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t chunks = chunks_of(s);
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    cudaError_t e = launch(count_kernel<Col>, unsigned(chunks), 32, 0, stream, s.crow, col, s.n, chunks, scratch);
    if (e != cudaSuccess) return e;
    e = launch(prefix_kernel, unsigned(s.m), 32, 0, stream, chunks, scratch, crow_t);
    if (e != cudaSuccess) return e;
    e = launch(scan_kernel, 1, kScanThreads, 0, stream, s.m, crow_t, nullptr);
    if (e != cudaSuccess) return e;
    const auto fill = [&](auto* rows) {
      using Row = std::remove_pointer_t<decltype(rows)>;
      return launch(fill_kernel<T, Col, Row>, unsigned(chunks), 32, 0, stream, s.crow, col,
                    static_cast<const T*>(values), s.n, chunks, scratch, crow_t, rows, static_cast<T*>(values_t));
    };
    return s.n <= 32768 ? fill(static_cast<int16_t*>(row_t)) : fill(static_cast<int32_t*>(row_t));
  });
}

}  // namespace slk::cuda
