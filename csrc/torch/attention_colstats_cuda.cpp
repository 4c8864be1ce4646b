// attention_colstats at the torch boundary, on CUDA. Nothing here waits for the device.
#ifdef SLKERNELS_WITH_CUDA
#include <algorithm>

#include "torch/attention_cuda.h"

namespace slk {
namespace {

// Blocks of threads to aim for; fixed, so that the order of sums depends on shapes only. Two for each multiprocessor of
// an H100, and 4 (3 Sk + Sq) bytes of scratch each.
constexpr int64_t kBlocks = 256;
constexpr int64_t kTilesOfBlock = 4;  // least tiles of 64 keys that are worth a block of threads
constexpr int64_t kLeastKeys = 64;

// Column sums, column maxima, diagonal sums, block sums.
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor numbers(const Tensor& like, const Shape& shape) {
  return empty_like_shape(like, shape, ScalarType::Float);
}
Tensor zeros(const Tensor& like, const Shape& shape) {
  Tensor t = numbers(like, shape);
  return torch::stable::zero_(t);
}

Statistics colstats(const char* op, const AttentionInputs& in, const BlockRows& mask, Range queries,
                    const std::optional<Tensor>& given_lse, cudaStream_t stream) {
  check_attention_device(op, in);
  const Tensor q = with_aligned_heads(in.q), k = with_aligned_heads(in.k);
  const AttentionShape& s = in.shape;
  const int64_t heads = s.batch * s.heads_q, blocks = mask.rows.blocks, key_blocks = ceil_div(s.sk, mask.block_n);
  const Shape of_keys = {s.batch, s.heads_q, s.sk}, of_blocks = {s.batch, s.heads_q, blocks, key_blocks};
  if (heads == 0 || s.sk == 0 || queries.size() == 0)
    return {zeros(q, of_keys), zeros(q, of_keys), zeros(q, of_keys), zeros(q, of_blocks)};

  // Runs of blocks of queries first; where there are few of them (the last queries of a prompt), runs of tiles too.
  const int64_t rows = ceil_div(queries.end, mask.block_m) - queries.begin / mask.block_m;
  const int64_t wanted = ceil_div(kBlocks, heads), parts = std::min(wanted, rows);
  const int64_t tiles = ceil_div(s.sk, kLeastKeys * kTilesOfBlock);
  const int64_t splits = std::clamp<int64_t>(wanted / parts, 1, std::max<int64_t>(tiles, 1)), runs = parts * splits;
  const Tensor part_sum = zeros(q, {heads, runs, s.sk}), part_max = zeros(q, {heads, runs, s.sk}),
               part_diagonal = zeros(q, {heads, runs, s.sk + s.sq - 1}),
               part_blocks = zeros(q, {heads, splits, blocks, key_blocks});
  const Tensor lse = given_lse ? as_contiguous(*given_lse) : Tensor();
  const Tensor partial_lse = given_lse ? Tensor() : numbers(q, {heads, s.sq, splits, 2});
  const Tensor sum = numbers(q, of_keys), top = numbers(q, of_keys), diagonals = numbers(q, of_keys),
               sums = numbers(q, of_blocks);

  cuda::ColStatsLaunch c = {};
  AttentionForward& f = c.stats.forward;
  f.shape = s;
  f.shape.dk = q.size(3);
  f.mask = mask;
  f.q = q.const_data_ptr(), f.q_strides = aligned_strides(q);
  f.k = k.const_data_ptr(), f.k_strides = aligned_strides(k);
  f.lse = given_lse ? const_cast<void*>(lse.const_data_ptr()) : nullptr;
  c.stats.queries = queries;
  c.stats.parts = parts;
  c.stats.col_sum = part_sum.mutable_data_ptr<float>();
  c.stats.col_max = part_max.mutable_data_ptr<float>();
  c.stats.diagonal = part_diagonal.mutable_data_ptr<float>();
  c.stats.block_sum = part_blocks.mutable_data_ptr<float>();
  c.splits = splits;
  c.partial_lse = given_lse ? nullptr : partial_lse.mutable_data_ptr<float>();
  c.col_sum = sum.mutable_data_ptr<float>();
  c.col_max = top.mutable_data_ptr<float>();
  c.diag_sum = diagonals.mutable_data_ptr<float>();
  c.block_sum = sums.mutable_data_ptr<float>();
  check_cuda(op, cuda::launch_attention_colstats(c, stream));
  return {sum, top, diagonals, sums};
}

Statistics attention_colstats(const Tensor& q, const Tensor& k, int64_t row_begin, std::optional<int64_t> row_end,
                              bool causal, int64_t block_m, int64_t block_n, std::optional<Tensor> lse,
                              std::optional<double> scale, double softcap) {
  const char* op = "attention_colstats";
  const int64_t end = row_end.value_or(q.dim() == 4 ? q.size(2) : 0);
  const AttentionInputs in = check_colstats(op, q, k, row_begin, end, lse, scale, softcap);
  check_blocks(op, block_m, block_n);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(op, q.get_device_index());

  const AttentionShape& s = in.shape;
  const int64_t rows = ceil_div(s.sq, block_m), blocks = ceil_div(s.sk, block_n);
  const Tensor ints = empty_like_shape(q, {3 * rows + blocks + s.sq}, ScalarType::Int);
  int32_t* const first = ints.mutable_data_ptr<int32_t>();
  const cuda::PlainMask lists = {first, first + rows, first + 2 * rows, first + 3 * rows, first + 3 * rows + blocks};
  check_cuda(op, cuda::launch_plain_mask(s, causal, block_m, block_n, lists, stream));
  BlockRows mask = {};
  mask.rows = {lists.ptr, lists.cnt, lists.nmask, lists.idx, nullptr, blocks, rows};
  mask.batches = mask.heads = 1;
  mask.block_m = block_m, mask.block_n = mask.unit = block_n;
  mask.hi = causal ? lists.hi : nullptr;
  return colstats(op, in, mask, {row_begin, end}, lse, stream);
}

Statistics block_sparse_colstats(const Tensor& q, const Tensor& k, SLK_LAYOUT_PARAMETERS, int64_t row_begin,
                                 std::optional<int64_t> row_end, std::optional<Tensor> lse, std::optional<double> scale,
                                 double softcap) {
  const char* op = "block_sparse_colstats";
  const int64_t end = row_end.value_or(q.dim() == 4 ? q.size(2) : 0);
  const AttentionInputs in = check_colstats(op, q, k, row_begin, end, lse, scale, softcap);
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const BlockRows mask = check_layout_tensors(op, in, layout);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return colstats(op, in, mask, {row_begin, end}, lse, current_stream(op, q.get_device_index()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("attention_colstats", TORCH_BOX(&attention_colstats));
  m.impl("block_sparse_colstats", TORCH_BOX(&block_sparse_colstats));
}

}  // namespace slk
#endif
