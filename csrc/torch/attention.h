// Block-sparse attention at the torch boundary: the checks that its ops share on every device.
#pragma once

#include "slkernels/attention.h"
#include "torch/tensor.h"

namespace slk {

// The layout arguments of an op, in the order of its schema.
struct LayoutTensors {
  Tensor row_ptr, row_cnt, row_nmask, idx;
  int64_t block_m, block_n, unit;
  std::optional<Tensor> lo, hi;
  int64_t sink;
  std::optional<Tensor> bits, bit_id, col_ptr, col_idx;
  std::optional<Tensor> t_ptr, t_cnt, t_nmask, t_idx, t_bit_id;
};

// The layout parameters of an op's implementation, and the LayoutTensors of them.
#define SLK_LAYOUT_PARAMETERS                                                                                \
  const Tensor &row_ptr, const Tensor &row_cnt, const Tensor &row_nmask, const Tensor &idx, int64_t block_m, \
      int64_t block_n, int64_t unit, std::optional<Tensor> lo, std::optional<Tensor> hi, int64_t sink,       \
      std::optional<Tensor> bits, std::optional<Tensor> bit_id, std::optional<Tensor> col_ptr,               \
      std::optional<Tensor> col_idx, std::optional<Tensor> t_ptr, std::optional<Tensor> t_cnt,               \
      std::optional<Tensor> t_nmask, std::optional<Tensor> t_idx, std::optional<Tensor> t_bit_id
#define SLK_LAYOUT_TENSORS                                                                                         \
  slk::LayoutTensors {                                                                                             \
    row_ptr, row_cnt, row_nmask, idx, block_m, block_n, unit, lo, hi, sink, bits, bit_id, col_ptr, col_idx, t_ptr, \
        t_cnt, t_nmask, t_idx, t_bit_id                                                                            \
  }

// q, k or v: checked with the others, features contiguous (a copy where they are not).
struct AttentionInputs {
  Tensor q, k, v;
  AttentionShape shape;
};

// Checks dtypes, shapes and devices; nothing of the layout's contents is read.
AttentionInputs check_attention_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                       std::optional<double> scale, double softcap);
// Points into `layout`, whose tensors are made contiguous where they are not.
BlockRows check_layout_tensors(const char* op, const AttentionInputs& in, LayoutTensors& layout);
// Raises for layouts that are forward only.
void check_has_gradients(const char* op, const BlockRows& mask);
BlockList check_transposed_lists(const char* op, const AttentionInputs& in, const BlockRows& mask,
                                 LayoutTensors& layout);

// The kernels' view of the arguments: o and lse are written by the forward and read by the backward.
AttentionForward forward_arguments(const AttentionInputs& in, const BlockRows& mask, const Tensor& o,
                                   const Tensor& lse);

// q and k of the column statistics checked (k stands in for v, which is not needed), and the range of queries.
AttentionInputs check_colstats(const char* op, const Tensor& q, const Tensor& k, int64_t row_begin, int64_t row_end,
                               const std::optional<Tensor>& lse, std::optional<double> scale, double softcap);
void check_blocks(const char* op, int64_t block_m, int64_t block_n);  // 64 or 128

// A tensor like the result o, of q's dtype; a number for each query, of lse's dtype.
void check_like_result(const char* op, const char* name, const Tensor& t, const AttentionInputs& in);
void check_query_numbers(const char* op, const char* name, const Tensor& t, const AttentionInputs& in);
// float64 for float64, else float32.
ScalarType sum_type(DType dtype);

// [B, H, S, features], with heads and tokens in memory in the order that `like` has them.
Tensor empty_in_order_of(const Tensor& like, int64_t features);
HeadStrides head_strides(const Tensor& t);
Tensor contiguous_features(const Tensor& t);

}  // namespace slk
