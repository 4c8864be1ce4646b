// random_support on the device: CSR of a counter-based random support, bit-equal to the CPU's.
//
//   crow [n + 1] int32, col [count] int16 or int32, sorted and unique in a row; scratch [n + count] int32.
//
// Four kernels, O(count) work and no host synchronisation:
//   count    a thread a sample: histogram of rows                      (integer atomics: any order, same counts)
//   scan     one block: crow = exclusive prefix sum, cursor = crow
//   scatter  a thread a sample, evaluated again instead of stored: unsorted[cursor[row]++] = column, in any order
//   sort     a block a row: marks the row's columns in a bitmap in shared memory and reads it back in order, which
//   makes
//            the result independent of the order in which scatter's atomics ran
#include "slkernels/block_scan.cuh"
#include "slkernels/launch.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;              // one block scans all rows: as wide as a block can be
constexpr int kWindowWords = 8192;              // bitmap of 32 KB: 262144 columns a pass, below the 48 KB static limit
constexpr int64_t kWindow = kWindowWords * 32;  // columns a pass
constexpr int kBlock = 8;

__global__ void count_kernel(SupportSampler sampler, int32_t* crow) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < sampler.count) atomicAdd(&crow[sampler(i).row + 1], 1);
}

// crow[1..n] holds counts on entry and their inclusive prefix sums on exit.
__global__ void scan_kernel(int64_t n, int32_t* crow, int32_t* cursor) {
  __shared__ int sums[kScanThreads / 32];
  int carry = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t r = first + threadIdx.x;
    const int before = carry + (r < n ? crow[r + 1] : 0);
    const int inclusive = block_inclusive_scan(before - carry, sums);
    if (r < n) {
      cursor[r] = carry + inclusive - (before - carry);
      crow[r + 1] = carry + inclusive;
    }
    carry += sums[kScanThreads / 32 - 1];
    __syncthreads();  // sums is rewritten by the next pass
  }
}

__global__ void scatter_kernel(SupportSampler sampler, int32_t* cursor, int32_t* unsorted) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= sampler.count) return;
  const Position p = sampler(i);
  unsorted[atomicAdd(&cursor[p.row], 1)] = int32_t(p.col);
}

template <class Col>
__global__ void sort_kernel(int64_t m, const int32_t* crow, const int32_t* unsorted, Col* col, int words) {
  uint32_t* bitmap = dynamic_shared<uint32_t>();  // [words]
  __shared__ int sums[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int begin = crow[row], end = crow[row + 1];
  int out = begin;
  for (int64_t window = 0; window < m; window += int64_t(words) * 32) {
    for (int w = threadIdx.x; w < words; w += kThreads) bitmap[w] = 0;
    __syncthreads();
    for (int k = begin + threadIdx.x; k < end; k += kThreads) {
      const int64_t offset = int64_t(unsorted[k]) - window;
      if (offset >= 0 && offset < int64_t(words) * 32) atomicOr(&bitmap[offset / 32], 1u << (offset % 32));
    }
    __syncthreads();
    for (int first = 0; first < words; first += kThreads) {
      const int w = first + threadIdx.x;
      uint32_t bits = w < words ? bitmap[w] : 0;
      const int mine = __popc(bits);
      const int inclusive = block_inclusive_scan(mine, sums);
      int slot = out + inclusive - mine;
      for (; bits; bits &= bits - 1) col[slot++] = Col(window + int64_t(w) * 32 + __ffs(int(bits)) - 1);
      out += sums[kThreads / 32 - 1];
      __syncthreads();
    }
  }
}

template <class Col>
cudaError_t random_support(const SupportSampler& sampler, int32_t* crow, Col* col, int32_t* scratch,
                           cudaStream_t stream) {
  int32_t* cursor = scratch;
  int32_t* unsorted = scratch + sampler.n;
  cudaError_t error = cudaMemsetAsync(crow, 0, (sampler.n + 1) * sizeof(int32_t), stream);
  if (error != cudaSuccess || sampler.count == 0) return error;
  const dim3 grid(unsigned(ceil_div(sampler.count, kThreads)));
  error = launch(count_kernel, grid, kThreads, 0, stream, sampler, crow);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel, 1, kScanThreads, 0, stream, sampler.n, crow, cursor);
  if (error != cudaSuccess) return error;
  error = launch(scatter_kernel, grid, kThreads, 0, stream, sampler, cursor, unsorted);
  if (error != cudaSuccess) return error;
  const int words = int(ceil_div(sampler.m < kWindow ? sampler.m : kWindow, 32));
  return launch(sort_kernel<Col>, unsigned(sampler.n), kThreads, words * sizeof(uint32_t), stream, sampler.m, crow,
                unsorted, col, words);
}

// A block of threads a row of blocks; its rows have equal lengths, so crow needs no scan: only the last column of
// blocks is narrower, and columns are sorted, so it can only be a row's last block.
template <class BlockCol, class Col>
__global__ void expand_kernel(const int32_t* block_crow, const BlockCol* block_col, int64_t n, int64_t m, int32_t* crow,
                              Col* col) {
  const int64_t block_row = blockIdx.x, first_row = block_row * kBlock;
  const int rows = int(n - first_row < kBlock ? n - first_row : kBlock);
  const int32_t begin = block_crow[block_row], blocks = block_crow[block_row + 1] - begin;
  const int cut = int(kBlock * ((m + kBlock - 1) / kBlock) - m);  // columns that the last block column lacks
  const int64_t last_column = (m + kBlock - 1) / kBlock - 1;
  // Nonzeros before this row of blocks: 8 rows of all earlier blocks, less 8 * cut for each earlier row that ends in a
  // cut block.
  __shared__ int cut_rows;
  if (threadIdx.x == 0) cut_rows = 0;
  __syncthreads();
  if (cut) {
    int found = 0;
    for (int64_t r = threadIdx.x; r < block_row; r += blockDim.x) {
      const int32_t end = block_crow[r + 1];
      if (end > block_crow[r] && int64_t(block_col[end - 1]) == last_column) ++found;
    }
    if (found) atomicAdd(&cut_rows, found);
  }
  __syncthreads();
  const int64_t before = int64_t(kBlock) * (int64_t(kBlock) * begin - int64_t(cut) * cut_rows);
  const bool ends_cut = cut && blocks > 0 && int64_t(block_col[begin + blocks - 1]) == last_column;
  const int length = blocks * kBlock - (ends_cut ? cut : 0);
  for (int r = threadIdx.x; r < rows; r += blockDim.x)
    crow[first_row + r + 1] = int32_t(before + int64_t(r + 1) * length);
  if (block_row == 0 && threadIdx.x == 0) crow[0] = 0;
  for (int k = threadIdx.x; k < rows * length; k += blockDim.x) {
    const int r = k / length, c = k % length;
    col[before + int64_t(r) * length + c] = Col(int64_t(block_col[begin + c / kBlock]) * kBlock + c % kBlock);
  }
}

}  // namespace

cudaError_t launch_random_support(const SupportSampler& sampler, int32_t* crow, void* col, bool col_is_16,
                                  int32_t* scratch, cudaStream_t stream) {
  return col_is_16 ? random_support(sampler, crow, static_cast<int16_t*>(col), scratch, stream)
                   : random_support(sampler, crow, static_cast<int32_t*>(col), scratch, stream);
}

cudaError_t launch_expand_blocks(const int32_t* block_crow, const void* block_col, bool block_col_is_16, int64_t n,
                                 int64_t m, int32_t* crow, void* col, bool col_is_16, cudaStream_t stream) {
  if (n == 0) return cudaMemsetAsync(crow, 0, sizeof(int32_t), stream);
  const dim3 grid(unsigned(ceil_div(n, kBlock)));
  const auto run = [&](auto* blocks, auto* columns) {
    using BlockCol = std::remove_pointer_t<decltype(blocks)>;
    using Col = std::remove_pointer_t<decltype(columns)>;
    return launch(expand_kernel<BlockCol, Col>, grid, kThreads, 0, stream, block_crow,
                  static_cast<const BlockCol*>(block_col), n, m, crow, static_cast<Col*>(col));
  };
  if (!block_col_is_16) return run((int32_t*)nullptr, (int32_t*)nullptr);
  return col_is_16 ? run((int16_t*)nullptr, (int16_t*)nullptr) : run((int16_t*)nullptr, (int32_t*)nullptr);
}

}  // namespace slk::cuda
