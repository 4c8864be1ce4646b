// attention_colstats at the torch boundary, on the CPU.
#include "torch/attention_cpu.h"

namespace slk {
namespace {

// Units of work to aim for; fixed, so that the order of sums does not depend on the number of threads.
constexpr int64_t kUnits = 16;

// Column sums, column maxima, diagonal sums, block sums.
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The mask of a dense or causal (bottom right) attention. Row iq sees the first blocks of keys: with idx descending,
// its entries are a suffix of idx, PARTIAL ones first.
struct PlainLayout {
  std::vector<int32_t> ptr, cnt, nmask, idx, hi;
  BlockRows mask = {};

  PlainLayout(const AttentionShape& s, bool causal, int64_t block_m, int64_t block_n) {
    const int64_t rows = ceil_div(s.sq, block_m), blocks = ceil_div(s.sk, block_n);
    for (int64_t jk = blocks; jk-- > 0;) idx.push_back(int32_t(jk));
    const auto seen = [&](int64_t i) { return causal ? std::clamp<int64_t>(i + 1 + s.sk - s.sq, 0, s.sk) : s.sk; };
    for (int64_t iq = 0; iq < rows; ++iq) {
      const int64_t full_keys = seen(iq * block_m), keys = seen(std::min((iq + 1) * block_m, s.sq) - 1);
      const int64_t entries = ceil_div(keys, block_n), full = full_keys == s.sk ? blocks : full_keys / block_n;
      ptr.push_back(int32_t(blocks - entries));
      cnt.push_back(int32_t(entries));
      nmask.push_back(int32_t(entries - full));
    }
    if (causal)
      for (int64_t i = 0; i < s.sq; ++i) hi.push_back(int32_t(seen(i)));
    mask.rows = {ptr.data(), cnt.data(), nmask.data(), idx.data(), nullptr, blocks, rows};
    mask.batches = mask.heads = 1;
    mask.block_m = block_m, mask.block_n = mask.unit = block_n;
    mask.hi = causal ? hi.data() : nullptr;
  }
};

// [parts, n] summed (or the maximum taken) over parts, into out [n].
template <class Combine>
void reduce_parts(const float* in, int64_t parts, int64_t n, float* out, const Combine& combine) {
  std::copy(in, in + n, out);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t j = 0; j < n; ++j) out[j] = combine(out[j], in[p * n + j]);
}

Statistics colstats(const Tensor& q, const BlockRows& mask, const AttentionInputs& in, Range queries,
                    const std::optional<Tensor>& given_lse) {
  AttentionShape s = in.shape;
  s.dv = 0;
  const int64_t heads = s.batch * s.heads_q, blocks = mask.rows.blocks, key_blocks = ceil_div(s.sk, mask.block_n);
  const Tensor lse =
      given_lse ? as_contiguous(*given_lse) : empty_like_shape(q, {s.batch, s.heads_q, s.sq}, ScalarType::Float);
  AttentionForward args = {};
  args.shape = s;
  args.mask = mask;
  args.q = in.q.const_data_ptr(), args.q_strides = head_strides(in.q);
  args.k = args.v = in.k.const_data_ptr(), args.k_strides = head_strides(in.k);
  args.o = args.lse = lse.mutable_data_ptr();

  const cpu::AttentionKernels& kernels = cpu::attention_kernels();
  const int64_t scratch_floats = kernels.scratch(s, mask);
  const Range touched = {queries.begin / mask.block_m, ceil_div(queries.end, mask.block_m)};
  const int64_t rows = touched.size();
  if (!given_lse)
    for_each_item(heads * rows, scratch_floats, [&](int64_t i, float* scratch) {
      const int64_t h = i / rows;
      kernels.forward(args, {h / s.heads_q, h % s.heads_q, touched.end - 1 - i % rows}, scratch);
    });

  const auto zeros = [&](int64_t a, int64_t b) {
    return torch::stable::fill_(empty_like_shape(q, {s.batch, s.heads_q, a, b}, ScalarType::Float), 0);
  };
  const auto numbers = [&](int64_t n) { return empty_like_shape(q, {s.batch, s.heads_q, n}, ScalarType::Float); };
  const Tensor sum = numbers(s.sk), top = numbers(s.sk), diagonals = numbers(s.sk), sums = zeros(blocks, key_blocks);
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(kUnits, std::max<int64_t>(heads, 1)), 1, std::max<int64_t>(rows, 1));
  const int64_t distances = s.sk + s.sq - 1;
  if (heads == 0 || s.sk == 0 || queries.size() == 0) {
    for (const Tensor& t : {sum, top, diagonals}) torch::stable::fill_(t, 0);
    return {sum, top, diagonals, sums};
  }
  const auto partial = [&](int64_t n) { return empty_like_shape(q, {heads, parts, n}, ScalarType::Float); };
  const Tensor part_sum = partial(s.sk), part_top = partial(s.sk), part_diagonal = partial(distances);
  const AttentionColStats stats = {args,
                                   queries,
                                   parts,
                                   part_sum.mutable_data_ptr<float>(),
                                   part_top.mutable_data_ptr<float>(),
                                   part_diagonal.mutable_data_ptr<float>(),
                                   sums.mutable_data_ptr<float>()};
  for_each_item(heads * parts, scratch_floats, [&](int64_t i, float* scratch) {
    const int64_t h = i / parts;
    kernels.colstats(stats, {h / s.heads_q, h % s.heads_q, i % parts}, scratch);
  });
  const auto plus = [](float a, float b) { return a + b; };
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  float *sum_data = sum.mutable_data_ptr<float>(), *top_data = top.mutable_data_ptr<float>(),
        *diagonal_data = diagonals.mutable_data_ptr<float>();
  for_each_item(heads, distances, [&](int64_t h, float* scratch) {
    reduce_parts(stats.col_sum + h * parts * s.sk, parts, s.sk, sum_data + h * s.sk, plus);
    reduce_parts(stats.col_max + h * parts * s.sk, parts, s.sk, top_data + h * s.sk, larger);
    reduce_parts(stats.diagonal + h * parts * distances, parts, distances, scratch, plus);
    for (int64_t d = 0; d < s.sk; ++d) diagonal_data[h * s.sk + d] = scratch[s.sk - 1 - d];
  });
  return {sum, top, diagonals, sums};
}

Statistics attention_colstats(const Tensor& q, const Tensor& k, int64_t row_begin, std::optional<int64_t> row_end,
                              bool causal, int64_t block_m, int64_t block_n, std::optional<Tensor> lse,
                              std::optional<double> scale, double softcap) {
  const char* op = "attention_colstats";
  const int64_t end = row_end.value_or(q.dim() == 4 ? q.size(2) : 0);
  const AttentionInputs in = check_colstats(op, q, k, row_begin, end, lse, scale, softcap);
  check_blocks(op, block_m, block_n);
  const PlainLayout layout(in.shape, causal, block_m, block_n);
  return colstats(q, layout.mask, in, {row_begin, end}, lse);
}

Statistics block_sparse_colstats(const Tensor& q, const Tensor& k, SLK_LAYOUT_PARAMETERS, int64_t row_begin,
                                 std::optional<int64_t> row_end, std::optional<Tensor> lse, std::optional<double> scale,
                                 double softcap) {
  const char* op = "block_sparse_colstats";
  const int64_t end = row_end.value_or(q.dim() == 4 ? q.size(2) : 0);
  const AttentionInputs in = check_colstats(op, q, k, row_begin, end, lse, scale, softcap);
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const BlockRows mask = check_layout_tensors(op, in, layout);
  check_rows_inside(op, in.shape, mask);
  return colstats(q, mask, in, {row_begin, end}, lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("attention_colstats", TORCH_BOX(&attention_colstats));
  m.impl("block_sparse_colstats", TORCH_BOX(&block_sparse_colstats));
}

}  // namespace slk
