// Checks of block-sparse attention's arguments.
#include <cmath>

#include "torch/attention_cpu.h"

namespace slk {
namespace {

constexpr int64_t kMaxTokens = (int64_t(1) << 31) - 1 - 128;  // a tile's last key is an int32

void check_ints(const char* op, const char* name, Tensor& t, const Tensor& q) {
  check(t.scalar_type() == ScalarType::Int, op, name, " must be int32, got ", show(t.scalar_type()));
  check_same_device(op, name, t, "q", q);
  t = as_contiguous(t);
}
void check_ints(const char* op, const char* name, Tensor& t, const Tensor& q, const Shape& shape) {
  bool fits = t.dim() == int64_t(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = t.size(d) == shape[d];
  if (!fits) {
    std::ostringstream text;
    for (size_t d = 0; d < shape.size(); ++d) text << (d ? ", " : "") << shape[d];
    check(false, op, name, " must be [", text.str(), "], got ", show(t));
  }
  check_ints(op, name, t, q);
}

// lo or hi: one number a query, for all batches or each, for all mask heads or each.
const int32_t* check_bound(const char* op, const char* name, std::optional<Tensor>& t, const AttentionInputs& in,
                           const BlockRows& mask, int64_t& batch_stride, int64_t& head_stride) {
  batch_stride = head_stride = 0;
  if (!t) return nullptr;
  const int64_t batch = in.shape.batch, sq = in.shape.sq;
  check(t->dim() == 3 && (t->size(0) == 1 || t->size(0) == batch) && (t->size(1) == 1 || t->size(1) == mask.heads) &&
            t->size(2) == sq,
        op, name, " must be [1 or ", batch, ", 1 or ", mask.heads, ", ", sq, "], got ", show(*t));
  check_ints(op, name, *t, in.q);
  batch_stride = t->size(0) == 1 ? 0 : t->size(1) * sq;
  head_stride = t->size(1) == 1 ? 0 : sq;
  return t->const_data_ptr<int32_t>();
}

BlockList block_list(const Tensor& ptr, const Tensor& cnt, const Tensor& nmask, const Tensor& idx,
                     const std::optional<Tensor>& bit_id) {
  return {ptr.const_data_ptr<int32_t>(),
          cnt.const_data_ptr<int32_t>(),
          nmask.const_data_ptr<int32_t>(),
          idx.const_data_ptr<int32_t>(),
          bit_id ? bit_id->const_data_ptr<int32_t>() : nullptr,
          idx.size(0),
          ptr.size(2)};
}

}  // namespace

Tensor contiguous_features(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

HeadStrides head_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

Tensor empty_in_order_of(const Tensor& like, int64_t features) {
  const int64_t batch = like.size(0), heads = like.size(1), tokens = like.size(2);
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(empty_like_shape(like, {batch, tokens, heads, features}), 1, 2);
  return empty_like_shape(like, {batch, heads, tokens, features});
}

AttentionInputs check_attention_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                       std::optional<double> scale, double softcap) {
  const DType dtype = dtype_of(op, "q", q);
  check(q.dim() == 4 && q.size(3) >= 1, op, "q must be [B, Hq, Sq, Dk], got ", show(q));
  const int64_t batch = q.size(0), heads = q.size(1), dk = q.size(3);
  check(k.dim() == 4 && k.size(0) == batch && k.size(3) == dk, op, "k must be [", batch, ", Hkv, Sk, ", dk, "], got ",
        show(k));
  const int64_t heads_kv = k.size(1), sk = k.size(2);
  check(v.dim() == 4 && v.size(0) == batch && v.size(1) == heads_kv && v.size(2) == sk && v.size(3) >= 1, op,
        "v must be [", batch, ", ", heads_kv, ", ", sk, ", Dv], got ", show(v));
  check(heads_kv > 0 && heads % heads_kv == 0, op, "q's heads must be a multiple of k's, got ", heads, " and ",
        heads_kv);
  check(q.size(2) <= kMaxTokens && sk <= kMaxTokens, op, "q and k must have at most ", kMaxTokens, " tokens, got ",
        q.size(2), " and ", sk);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check(softcap >= 0 && std::isfinite(softcap), op, "softcap must be finite and not negative, got ", softcap);
  const double factor = scale ? *scale : 1 / std::sqrt(double(dk));
  check(std::isfinite(factor), op, "scale must be finite, got ", factor);
  return {contiguous_features(q),
          contiguous_features(k),
          contiguous_features(v),
          {batch, heads, heads_kv, q.size(2), sk, dk, v.size(3), factor, softcap, dtype}};
}

BlockRows check_layout_tensors(const char* op, const AttentionInputs& in, LayoutTensors& layout) {
  const AttentionShape& s = in.shape;
  const int64_t m = layout.block_m, n = layout.block_n;
  check_blocks(op, m, n);
  check(layout.unit == 1 || layout.unit == n, op, "unit must be 1 or block_n = ", n, ", got ", layout.unit);
  check(layout.sink >= 0, op, "sink must not be negative, got ", layout.sink);

  Tensor& ptr = layout.row_ptr;
  const int64_t blocks = ceil_div(s.sq, m);
  check(ptr.dim() == 3 && (ptr.size(0) == 1 || ptr.size(0) == s.batch) &&
            (ptr.size(1) == 1 || ptr.size(1) == s.heads_kv || ptr.size(1) == s.heads_q) && ptr.size(2) == blocks,
        op, "row_ptr must be [1 or ", s.batch, ", one of 1, ", s.heads_kv, ", ", s.heads_q, ", ", blocks, "], got ",
        show(ptr));
  const Shape shape = shape_of(ptr);
  check_ints(op, "row_ptr", ptr, in.q, shape);
  check_ints(op, "row_cnt", layout.row_cnt, in.q, shape);
  check_ints(op, "row_nmask", layout.row_nmask, in.q, shape);
  check(layout.idx.dim() == 1, op, "idx must be [entries], got ", show(layout.idx));
  check_ints(op, "idx", layout.idx, in.q);
  if (layout.bit_id) check_ints(op, "bit_id", *layout.bit_id, in.q, {layout.idx.size(0)});
  check(layout.bits.has_value() == layout.bit_id.has_value(), op, "bits and bit_id go together");

  BlockRows mask = {};
  mask.rows = block_list(ptr, layout.row_cnt, layout.row_nmask, layout.idx, layout.bit_id);
  mask.batches = shape[0];
  mask.heads = shape[1];
  mask.block_m = m;
  mask.block_n = n;
  mask.unit = layout.unit;
  mask.lo = check_bound(op, "lo", layout.lo, in, mask, mask.lo_batch, mask.lo_head);
  mask.hi = check_bound(op, "hi", layout.hi, in, mask, mask.hi_batch, mask.hi_head);
  mask.sink = layout.sink;
  if (layout.bits) {
    check(layout.bits->dim() == 3, op, "bits must be [tiles, ", m, ", ", n / 32, "], got ", show(*layout.bits));
    mask.bit_tiles = layout.bits->size(0);
    check_ints(op, "bits", *layout.bits, in.q, {mask.bit_tiles, m, n / 32});
    mask.bits = reinterpret_cast<const uint32_t*>(layout.bits->const_data_ptr<int32_t>());
  }
  check(layout.col_ptr.has_value() == layout.col_idx.has_value(), op, "col_ptr and col_idx go together");
  if (layout.col_ptr) {
    check_ints(op, "col_ptr", *layout.col_ptr, in.q, {shape[0] * shape[1] * shape[2] + 1});
    check(layout.col_idx->dim() == 1, op, "col_idx must be [columns], got ", show(*layout.col_idx));
    check_ints(op, "col_idx", *layout.col_idx, in.q);
    mask.col_ptr = layout.col_ptr->const_data_ptr<int32_t>();
    mask.col_idx = layout.col_idx->const_data_ptr<int32_t>();
    mask.columns = layout.col_idx->size(0);
  }
  return mask;
}

void check_has_gradients(const char* op, const BlockRows& mask) {
  check(mask.unit == mask.block_n, op, "no gradients for a layout with unit 1: unit must be block_n = ", mask.block_n);
  check(!mask.col_ptr, op, "no gradients for a layout with gathered columns (col_ptr, col_idx)");
}

BlockList check_transposed_lists(const char* op, const AttentionInputs& in, const BlockRows& mask,
                                 LayoutTensors& layout) {
  check(layout.t_ptr && layout.t_cnt && layout.t_nmask && layout.t_idx, op,
        "needs the transposed lists t_ptr, t_cnt, t_nmask and t_idx");
  const Shape shape = {mask.batches, mask.heads, ceil_div(in.shape.sk, mask.block_n)};
  check_ints(op, "t_ptr", *layout.t_ptr, in.q, shape);
  check_ints(op, "t_cnt", *layout.t_cnt, in.q, shape);
  check_ints(op, "t_nmask", *layout.t_nmask, in.q, shape);
  check(layout.t_idx->dim() == 1, op, "t_idx must be [entries], got ", show(*layout.t_idx));
  check_ints(op, "t_idx", *layout.t_idx, in.q);
  check(layout.t_bit_id.has_value() == layout.bit_id.has_value(), op, "bit_id and t_bit_id go together");
  if (layout.t_bit_id) check_ints(op, "t_bit_id", *layout.t_bit_id, in.q, {layout.t_idx->size(0)});
  return block_list(*layout.t_ptr, *layout.t_cnt, *layout.t_nmask, *layout.t_idx, layout.t_bit_id);
}

ScalarType sum_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

AttentionForward forward_arguments(const AttentionInputs& in, const BlockRows& mask, const Tensor& o,
                                   const Tensor& lse) {
  return {in.shape,
          mask,
          in.q.const_data_ptr(),
          in.k.const_data_ptr(),
          in.v.const_data_ptr(),
          head_strides(in.q),
          head_strides(in.k),
          head_strides(in.v),
          o.mutable_data_ptr(),
          head_strides(o),
          lse.mutable_data_ptr()};
}

void check_like_result(const char* op, const char* name, const Tensor& t, const AttentionInputs& in) {
  const AttentionShape& s = in.shape;
  check(t.dim() == 4 && t.size(0) == s.batch && t.size(1) == s.heads_q && t.size(2) == s.sq && t.size(3) == s.dv, op,
        name, " must be [", s.batch, ", ", s.heads_q, ", ", s.sq, ", ", s.dv, "], got ", show(t));
  check_same_dtype(op, name, t, "q", in.q);
  check_same_device(op, name, t, "q", in.q);
}

void check_query_numbers(const char* op, const char* name, const Tensor& t, const AttentionInputs& in) {
  const AttentionShape& s = in.shape;
  check(t.dim() == 3 && t.size(0) == s.batch && t.size(1) == s.heads_q && t.size(2) == s.sq, op, name, " must be [",
        s.batch, ", ", s.heads_q, ", ", s.sq, "], got ", show(t));
  check(t.scalar_type() == sum_type(s.dtype), op, name, " must be ", show(sum_type(s.dtype)), ", got ",
        show(t.scalar_type()));
  check_same_device(op, name, t, "q", in.q);
}

// ---- layouts that lie inside --------------------------------------------------------------------------------------

void check_list_inside(const char* op, const char* prefix, const BlockList& list, int64_t lists, int64_t unit,
                       int64_t end, int64_t bit_tiles) {
  for (int64_t r = 0; r < lists; ++r) {
    const int64_t ptr = list.ptr[r], cnt = list.cnt[r], nmask = list.nmask[r];
    if (cnt < 0 || ptr < 0 || cnt > list.capacity - ptr)
      check(false, op, prefix, "_ptr[", r, "] = ", ptr, " and ", prefix, "_cnt[", r, "] = ", cnt,
            " must stay within the ", list.capacity, " entries");
    if (nmask < 0 || nmask > cnt) check(false, op, prefix, "_nmask[", r, "] must be in [0, ", cnt, "], got ", nmask);
    for (int64_t t = ptr; t < ptr + cnt; ++t) {
      if (list.idx[t] < 0 || list.idx[t] * unit >= end)
        check(false, op, *prefix == 't' ? "t_idx[" : "idx[", t, "] of list ", r, " must be in [0, ",
              ceil_div(end, unit), "), got ", list.idx[t]);
      if (list.bit_id && list.bit_id[t] >= bit_tiles)
        check(false, op, *prefix == 't' ? "t_bit_id[" : "bit_id[", t, "] of list ", r, " must be below ", bit_tiles,
              ", got ", list.bit_id[t]);
    }
  }
}

void check_rows_inside(const char* op, const AttentionShape& shape, const BlockRows& mask) {
  const int64_t lists = mask.batches * mask.heads * mask.rows.blocks;
  check_list_inside(op, "row", mask.rows, lists, mask.unit, shape.sk, mask.bit_tiles);
  if (!mask.col_ptr) return;
  check(mask.col_ptr[0] >= 0, op, "col_ptr[0] must not be negative, got ", mask.col_ptr[0]);
  for (int64_t r = 0; r < lists; ++r)
    if (mask.col_ptr[r + 1] < mask.col_ptr[r] || mask.col_ptr[r + 1] > mask.columns)
      check(false, op, "col_ptr[", r + 1, "] must be in [", mask.col_ptr[r], ", ", mask.columns, "], got ",
            mask.col_ptr[r + 1]);
  for (int64_t c = mask.col_ptr[0]; c < mask.col_ptr[lists]; ++c)
    if (mask.col_idx[c] < 0 || mask.col_idx[c] >= shape.sk)
      check(false, op, "col_idx[", c, "] must be in [0, ", shape.sk, "), got ", mask.col_idx[c]);
}

void check_blocks(const char* op, int64_t block_m, int64_t block_n) {
  check(block_m == 64 || block_m == 128, op, "block_m must be 64 or 128, got ", block_m);
  check(block_n == 64 || block_n == 128, op, "block_n must be 64 or 128, got ", block_n);
}

AttentionInputs check_colstats(const char* op, const Tensor& q, const Tensor& k, int64_t row_begin, int64_t row_end,
                               const std::optional<Tensor>& lse, std::optional<double> scale, double softcap) {
  const AttentionInputs in = check_attention_inputs(op, q, k, k, scale, softcap);
  check(in.shape.dtype != DType::f64, op, "q must be float32, bfloat16 or float16, got float64");
  check(row_begin >= 0 && row_begin <= row_end && row_end <= in.shape.sq, op, "rows must be a range within [0, ",
        in.shape.sq, "], got [", row_begin, ", ", row_end, ")");
  if (lse) check_query_numbers(op, "lse", *lse, in);
  return in;
}

}  // namespace slk
