// Builders of BlockRows whose places come from a prefix sum: vertical-slash's columns, and transposition. Contracts:
// slkernels/attention_layout.h. No atomics decide an order: the lists are the CPU's, bit for bit.
#include "slkernels/attention_layout.h"
#include "slkernels/block_scan.cuh"
#include "slkernels/launch.cuh"

namespace slk::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kScanThreads = 1024;  // one block scans all: as wide as a block can be

// starts[i] = counts[0] + ... + counts[i - 1] for i < n; *end, if given, the whole sum. In place if starts == counts.
__global__ void layout_scan_kernel(int64_t n, const int32_t* counts, int32_t* starts, int32_t* end) {
  __shared__ int sums[kScanThreads / 32];
  int carry = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    const int own = i < n ? counts[i] : 0;
    const int inclusive = block_inclusive_scan(own, sums);
    if (i < n) starts[i] = carry + inclusive - own;
    carry += sums[kScanThreads / 32 - 1];
    __syncthreads();  // sums is rewritten by the next pass
  }
  if (end && threadIdx.x == 0) *end = carry;
}

// ---- vertical-slash: a thread a row walks its lists twice, to count and to fill

struct CountRow {
  int64_t first_query, block, S;
  int32_t partial = 0, full = 0, columns = 0;

  __device__ void tile(int64_t start) {
    if (start < S) ++(start + block - 1 <= first_query ? full : partial);
  }
  __device__ void column(int64_t) { ++columns; }
};
struct FillRow {
  int64_t first_query, block, S;
  int32_t *partial, *full, *columns;

  __device__ void tile(int64_t start) {
    if (start >= S) return;
    if (start + block - 1 <= first_query)
      *full++ = int32_t(start);
    else
      *partial++ = int32_t(start);
  }
  __device__ void column(int64_t key) { *columns++ = int32_t(key); }
};

template <class Visitor>
__device__ void visit_row(const VerticalSlashArgs& args, int64_t r, Visitor& visitor) {
  const int64_t q_blocks = ceil_div(args.S, args.block), group = r / q_blocks;
  vertical_slash_row(
      r % q_blocks, args.block, args.vertical + group * args.verticals, args.verticals,
      args.slash + group * args.slashes, args.slashes, [&](int64_t start) { visitor.tile(start); },
      [&](int64_t key) { visitor.column(key); });
}

__global__ void layout_vertical_slash_count_kernel(VerticalSlashArgs args, RowLists out) {
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= out.rows) return;
  CountRow count = {r % ceil_div(args.S, args.block) * args.block, args.block, args.S};
  visit_row(args, r, count);
  out.ptr[r] = int32_t(r * out.width);
  out.cnt[r] = count.partial + count.full;
  out.nmask[r] = count.partial;
  args.col_ptr[r] = count.columns;
}

__global__ void layout_vertical_slash_fill_kernel(VerticalSlashArgs args, RowLists out) {
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= out.rows) return;
  int32_t* idx = out.idx + r * out.width;
  FillRow fill = {r % ceil_div(args.S, args.block) * args.block,
                  args.block,
                  args.S,
                  idx,
                  idx + out.nmask[r],
                  args.col_idx + args.col_ptr[r]};
  visit_row(args, r, fill);
}

// ---- transposition

// slots[r, jk] = position in idx of the row's entry of tile jk; -1 elsewhere (set before).
__global__ void layout_transpose_slots_kernel(BlockRows in, int64_t k_blocks, int32_t* slots) {
  const int64_t r = blockIdx.x;
  const int64_t first = in.rows.ptr[r], count = in.rows.cnt[r];
  if (first < 0) return;
  for (int64_t n = threadIdx.x; n < count && first + n < in.rows.capacity; n += kThreads) {
    const int64_t j = in.rows.idx[first + n];
    if (j >= 0 && j < k_blocks) slots[r * k_blocks + j] = int32_t(first + n);
  }
}

// A thread a column: neighbours read neighbouring slots. Calls visit(iq, slot, partial) for its entries, ascending.
template <class Visit>
__device__ void visit_column(const BlockRows& in, int64_t k_blocks, const int32_t* slots, int64_t c,
                             const Visit& visit) {
  const int64_t group = c / k_blocks, j = c % k_blocks;
  for (int64_t iq = 0; iq < in.rows.blocks; ++iq) {
    const int64_t r = group * in.rows.blocks + iq;
    const int32_t slot = slots[r * k_blocks + j];
    if (slot >= 0) visit(int32_t(iq), slot, slot - in.rows.ptr[r] < in.rows.nmask[r]);
  }
}

__global__ void layout_transpose_count_kernel(BlockRows in, TransposedLists out, int64_t k_blocks,
                                              const int32_t* slots) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= in.batches * in.heads * k_blocks) return;
  int32_t count = 0, partials = 0;
  visit_column(in, k_blocks, slots, c, [&](int32_t, int32_t, bool partial) {
    ++count;
    partials += partial;
  });
  out.cnt[c] = count;
  out.nmask[c] = partials;
}

__global__ void layout_transpose_fill_kernel(BlockRows in, TransposedLists out, int64_t k_blocks,
                                             const int32_t* slots) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= in.batches * in.heads * k_blocks) return;
  int64_t next_partial = out.ptr[c], next_full = next_partial + out.nmask[c];
  visit_column(in, k_blocks, slots, c, [&](int32_t iq, int32_t slot, bool partial) {
    const int64_t to = partial ? next_partial++ : next_full++;
    if (to >= in.rows.capacity) return;  // rows that share entries
    out.idx[to] = iq;
    if (out.bit_id) out.bit_id[to] = partial ? in.rows.bit_id[slot] : -1;
  });
}

unsigned blocks_of(int64_t threads) {
  return unsigned(ceil_div(threads, kThreads));
}

}  // namespace

cudaError_t launch_layout_vertical_slash(const VerticalSlashArgs& args, const RowLists& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaMemsetAsync(args.col_ptr, 0, sizeof(int32_t), stream);
  cudaError_t error = launch(layout_vertical_slash_count_kernel, blocks_of(out.rows), kThreads, 0, stream, args, out);
  if (error != cudaSuccess) return error;
  error = launch(layout_scan_kernel, 1, kScanThreads, 0, stream, out.rows, args.col_ptr, args.col_ptr,
                 args.col_ptr + out.rows);
  if (error != cudaSuccess) return error;
  return launch(layout_vertical_slash_fill_kernel, blocks_of(out.rows), kThreads, 0, stream, args, out);
}

cudaError_t launch_layout_transpose(const BlockRows& in, const TransposedLists& out, int64_t k_blocks, int32_t* slots,
                                    cudaStream_t stream) {
  const int64_t rows = in.batches * in.heads * in.rows.blocks, columns = in.batches * in.heads * k_blocks;
  if (columns == 0) return cudaSuccess;
  cudaError_t error = cudaMemsetAsync(slots, 0xff, rows * k_blocks * sizeof(int32_t), stream);
  if (error == cudaSuccess && rows > 0)
    error = launch(layout_transpose_slots_kernel, unsigned(rows), kThreads, 0, stream, in, k_blocks, slots);
  if (error == cudaSuccess)
    error = launch(layout_transpose_count_kernel, blocks_of(columns), kThreads, 0, stream, in, out, k_blocks, slots);
  if (error == cudaSuccess)
    error = launch(layout_scan_kernel, 1, kScanThreads, 0, stream, columns, out.cnt, out.ptr, nullptr);
  if (error == cudaSuccess)
    error = launch(layout_transpose_fill_kernel, blocks_of(columns), kThreads, 0, stream, in, out, k_blocks, slots);
  return error;
}

}  // namespace slk::cuda
