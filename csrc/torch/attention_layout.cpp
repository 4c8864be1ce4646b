// Builders of BlockRows at the torch boundary: checks, allocation, threads. Formats: slkernels/attention_layout.h.
#include "slkernels/attention_layout.h"

#include <algorithm>

#include "torch/tensor.h"

namespace slk {
namespace {

using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;                        // row_ptr, row_cnt, row_nmask, idx
using ListsAndTwo = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // and bits, bit_id, say

constexpr int64_t kInt32Max = (int64_t(1) << 31) - 1;

Tiling make_tiling(const char* op, int64_t M, int64_t N, int64_t Sq, int64_t Sk) {
  check(M == 64 || M == 128, op, "block_m must be 64 or 128, got ", M);
  check(N == 64 || N == 128, op, "block_n must be 64 or 128, got ", N);
  check(Sq >= 0 && Sk >= 0 && Sq <= kInt32Max - M && Sk <= kInt32Max - N, op,
        "sq and sk must be in [0, 2^31 - 128), got ", Sq, " and ", Sk);
  return {M, N, Sq, Sk};
}

void check_int32(const char* op, const char* name, const Tensor& t, int64_t dims, const char* shape) {
  check(t.dim() == dims, op, name, " must be ", shape, ", got ", show(t));
  check(t.scalar_type() == ScalarType::Int, op, name, " must be int32, got ", show(t.scalar_type()));
}
void check_bool(const char* op, const char* name, const Tensor& t, const char* shape) {
  check(t.dim() == 4, op, name, " must be ", shape, ", got ", show(t));
  check(t.scalar_type() == ScalarType::Bool, op, name, " must be bool, got ", show(t.scalar_type()));
}

int32_t* ints(const Tensor& t) {
  return t.mutable_data_ptr<int32_t>();
}

// The tensors of a builder's lists, and where it writes them.
struct NewLists {
  Tensor ptr, cnt, nmask, idx;
  RowLists rows;

  NewLists(const char* op, const Tensor& like, int64_t batches, int64_t heads, int64_t q_blocks, int64_t width) {
    const int64_t count = batches * heads * q_blocks;
    check(count * std::max<int64_t>(width, 1) <= kInt32Max, op, "more than 2^31 - 1 entries (", count, " rows of ",
          width, ")");
    const auto lists = [&](const Shape& shape) { return empty_like_shape(like, shape, ScalarType::Int); };
    ptr = lists({batches, heads, q_blocks});
    cnt = lists({batches, heads, q_blocks});
    nmask = lists({batches, heads, q_blocks});
    idx = lists({count * width});
    rows = {ints(ptr), ints(cnt), ints(nmask), ints(idx), count, width};
  }
  Lists tuple() const { return {ptr, cnt, nmask, idx}; }
  ListsAndTwo with(const Tensor& a, const Tensor& b) const { return {ptr, cnt, nmask, idx, a, b}; }
};

struct NewBits {
  Tensor bits, id;
  TileBits tiles;

  NewBits(const char* op, const NewLists& lists, const Tiling& t, int64_t per_row) {
    check(lists.rows.rows * per_row <= kInt32Max, op, "more than 2^31 - 1 bitmaps");
    bits = empty_like_shape(lists.ptr, {lists.rows.rows * per_row, t.M, t.N / 32});
    id = empty_like_shape(lists.ptr, {lists.rows.rows * lists.rows.width});
    tiles = {ints(id), reinterpret_cast<uint32_t*>(ints(bits)), per_row};
  }
};

// Rows in parallel; `cost` is a row's work in elements.
template <class Body>
void parallel_rows(int64_t rows, int64_t cost, const Body& body) {
  constexpr int64_t kGrain = 1 << 15;  // elements: a few microseconds, the price of waking a thread
  parallel_for(rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(cost, 1)),
               [&](int64_t b, int64_t e) { body(Range{b, e}); });
}

// ---- builders

Lists from_block_mask(const Tensor& block_mask, int64_t M, int64_t N, int64_t Sq, int64_t Sk, bool causal) {
  const char* op = "layout_from_block_mask";
  const Tiling t = make_tiling(op, M, N, Sq, Sk);
  check_bool(op, "block_mask", block_mask, "[B', Hm, q blocks, k blocks]");
  check(block_mask.size(2) == t.q_blocks() && block_mask.size(3) == t.k_blocks(), op, "block_mask must be [B', Hm, ",
        t.q_blocks(), ", ", t.k_blocks(), "], got ", show(block_mask));
  const Tensor mask = as_contiguous(block_mask);
  const NewLists out(op, mask, mask.size(0), mask.size(1), t.q_blocks(), t.k_blocks());
  const BlockMaskArgs args = {t, causal, mask.const_data_ptr<bool>()};
  parallel_rows(out.rows.rows, t.k_blocks(), [&](Range rows) { cpu::layout_block_mask(args, out.rows, rows); });
  return out.tuple();
}

Lists from_topk(const Tensor& indices, int64_t M, int64_t N, int64_t Sq, int64_t Sk, bool causal) {
  const char* op = "layout_from_topk";
  const Tiling t = make_tiling(op, M, N, Sq, Sk);
  check_int32(op, "indices", indices, 4, "[B', Hm, q blocks, k]");
  check(indices.size(2) == t.q_blocks(), op, "indices must be [B', Hm, ", t.q_blocks(), ", k], got ", show(indices));
  const Tensor ids = as_contiguous(indices);
  const int64_t k = ids.size(3);
  const NewLists out(op, ids, ids.size(0), ids.size(1), t.q_blocks(), std::min(k, t.k_blocks()));
  const TopkArgs args = {t, causal, ids.const_data_ptr<int32_t>(), k};
  for (int64_t e = 0; e < ids.numel(); ++e)
    check(args.indices[e] >= -1 && args.indices[e] < t.k_blocks(), op, "indices of row ", e / k, ", entry ", e % k,
          " is ", args.indices[e], ", outside [-1, ", t.k_blocks(), ")");
  parallel_rows(out.rows.rows, t.k_blocks() + k, [&](Range rows) { cpu::layout_topk(args, out.rows, rows); });
  return out.tuple();
}

Lists from_interval(const Tensor& lo, const Tensor& hi, int64_t sink, int64_t M, int64_t N, int64_t Sk) {
  const char* op = "layout_from_interval";
  check_int32(op, "lo", lo, 3, "[B', Hm, Sq]");
  check_int32(op, "hi", hi, 3, "[B', Hm, Sq]");
  check(shape_of(lo) == shape_of(hi), op, "lo and hi must have one shape, got ", show(lo), " and ", show(hi));
  check(sink >= 0, op, "sink must not be negative, got ", sink);
  const Tiling t = make_tiling(op, M, N, lo.size(2), Sk);
  const Tensor lows = as_contiguous(lo), highs = as_contiguous(hi);
  const NewLists out(op, lows, lo.size(0), lo.size(1), t.q_blocks(), t.k_blocks());
  const IntervalArgs args = {t, lows.const_data_ptr<int32_t>(), highs.const_data_ptr<int32_t>(), sink};
  parallel_rows(out.rows.rows, t.k_blocks() + M, [&](Range rows) { cpu::layout_interval(args, out.rows, rows); });
  return out.tuple();
}

void check_cu_seqlens(const char* op, const char* name, const Tensor& cu, int64_t tokens) {
  const int32_t* at = cu.const_data_ptr<int32_t>();
  check(at[0] == 0, op, name, "[0] must be 0, got ", at[0]);
  for (int64_t d = 1; d < cu.size(0); ++d)
    check(at[d] >= at[d - 1], op, name, " decreases at position ", d, " (", at[d], ")");
  check(at[cu.size(0) - 1] <= tokens, op, name, " ends at ", at[cu.size(0) - 1], ", behind the ", tokens, " tokens");
}

ListsAndTwo from_cu_seqlens(const Tensor& cu_q, const Tensor& cu_k, int64_t M, int64_t N, int64_t Sq, int64_t Sk,
                            bool causal) {
  const char* op = "layout_from_cu_seqlens";
  make_tiling(op, M, N, Sq, Sk);
  check_int32(op, "cu_q", cu_q, 1, "[documents + 1]");
  check_int32(op, "cu_k", cu_k, 1, "[documents + 1]");
  check(cu_q.size(0) >= 1 && cu_q.size(0) == cu_k.size(0), op, "cu_q and cu_k must be [documents + 1], got ",
        show(cu_q), " and ", show(cu_k));
  const Tensor q = as_contiguous(cu_q), k = as_contiguous(cu_k);
  check_cu_seqlens(op, "cu_q", q, Sq);
  check_cu_seqlens(op, "cu_k", k, Sk);
  const Tensor lo = empty_like_shape(q, {1, 1, Sq}), hi = empty_like_shape(q, {1, 1, Sq});
  const CuSeqlensArgs args = {
      q.const_data_ptr<int32_t>(), k.const_data_ptr<int32_t>(), q.size(0) - 1, Sq, causal, ints(lo), ints(hi)};
  cpu::layout_cu_seqlens(args);
  const auto [ptr, cnt, nmask, idx] = from_interval(lo, hi, 0, M, N, Sk);
  return {ptr, cnt, nmask, idx, lo, hi};
}

ListsAndTwo from_vertical_slash(const Tensor& vertical, const Tensor& slash, int64_t block, int64_t S) {
  const char* op = "layout_from_vertical_slash";
  const Tiling t = make_tiling(op, block, block, S, S);
  check_int32(op, "vertical", vertical, 3, "[B', Hm, columns]");
  check_int32(op, "slash", slash, 3, "[B', Hm, diagonals]");
  check(vertical.size(0) == slash.size(0) && vertical.size(1) == slash.size(1), op,
        "vertical and slash must have the same B' and Hm, got ", show(vertical), " and ", show(slash));
  const Tensor v = as_contiguous(vertical), s = as_contiguous(slash);
  const int64_t verticals = v.size(2), slashes = s.size(2);
  const NewLists out(op, v, v.size(0), v.size(1), t.q_blocks(), slashes + 1);
  check(out.rows.rows * verticals <= kInt32Max, op, "more than 2^31 - 1 columns");
  const Tensor col_ptr = empty_like_shape(v, {out.rows.rows + 1}),
               col_idx = empty_like_shape(v, {out.rows.rows * verticals});
  const VerticalSlashArgs args = {
      block,        S, v.const_data_ptr<int32_t>(), s.const_data_ptr<int32_t>(), verticals, slashes, ints(col_ptr),
      ints(col_idx)};
  for (int64_t e = 0; e < v.numel(); ++e) {
    check(args.vertical[e] >= 0 && args.vertical[e] < S, op, "vertical has ", args.vertical[e], ", outside [0, ", S,
          ")");
    check(e % verticals == 0 || args.vertical[e - 1] <= args.vertical[e], op, "vertical must ascend, got ",
          args.vertical[e - 1], " before ", args.vertical[e]);
  }
  for (int64_t e = 0; e < s.numel(); ++e) {
    check(args.slash[e] >= 0, op, "slash must not be negative, got ", args.slash[e]);
    check(e % slashes == 0 || args.slash[e - 1] >= args.slash[e], op, "slash must descend, got ", args.slash[e - 1],
          " before ", args.slash[e]);
  }
  cpu::layout_vertical_slash(args, out.rows);
  return out.with(col_ptr, col_idx);
}

ListsAndTwo from_dense_mask(const Tensor& dense, int64_t M, int64_t N) {
  const char* op = "layout_from_dense_mask";
  check_bool(op, "mask", dense, "[B', Hm, Sq, Sk]");
  const Tiling t = make_tiling(op, M, N, dense.size(2), dense.size(3));
  const Tensor mask = as_contiguous(dense);
  const NewLists out(op, mask, mask.size(0), mask.size(1), t.q_blocks(), t.k_blocks());
  const NewBits bits(op, out, t, t.k_blocks());
  const DenseMaskArgs args = {t, mask.const_data_ptr<bool>()};
  parallel_rows(out.rows.rows, M * t.Sk, [&](Range rows) { cpu::layout_dense_mask(args, out.rows, bits.tiles, rows); });
  return out.with(bits.bits, bits.id);
}

ListsAndTwo from_tree(const Tensor& parents, const Tensor& prefixes, int64_t M, int64_t N, int64_t Sk) {
  const char* op = "layout_from_tree";
  check_int32(op, "parent", parents, 2, "[B', nodes]");
  check_int32(op, "prefix", prefixes, 1, "[B']");
  check(prefixes.size(0) == parents.size(0), op, "prefix must be [", parents.size(0), "], got ", show(prefixes));
  const int64_t nodes = parents.size(1);
  const Tiling t = make_tiling(op, M, N, nodes, Sk);
  const Tensor parent = as_contiguous(parents), prefix = as_contiguous(prefixes);
  const NewLists out(op, parent, parent.size(0), 1, t.q_blocks(), t.k_blocks());
  const NewBits bits(op, out, t, ceil_div(nodes, N) + 1);
  const TreeArgs args = {t, parent.const_data_ptr<int32_t>(), prefix.const_data_ptr<int32_t>()};
  for (int64_t e = 0; e < parent.numel(); ++e)
    check(args.parent[e] >= -1 && args.parent[e] < e % nodes, op, "parent of node ", e % nodes, " is ", args.parent[e],
          ": it must be -1 or an earlier node");
  for (int64_t b = 0; b < prefix.numel(); ++b)
    check(args.prefix[b] >= 0 && args.prefix[b] + nodes <= Sk, op, "prefix ", args.prefix[b], " and ", nodes,
          " nodes do not fit in sk = ", Sk);
  parallel_rows(out.rows.rows, t.k_blocks() + M * nodes,
                [&](Range rows) { cpu::layout_tree(args, out.rows, bits.tiles, rows); });
  return out.with(bits.bits, bits.id);
}

// ---- transposition and validation

BlockRows as_block_rows(const char* op, const Tensor& ptr, const Tensor& cnt, const Tensor& nmask, const Tensor& idx,
                        const std::optional<Tensor>& bit_id) {
  check_int32(op, "row_ptr", ptr, 3, "[B', Hm, q blocks]");
  check_int32(op, "row_cnt", cnt, 3, "[B', Hm, q blocks]");
  check_int32(op, "row_nmask", nmask, 3, "[B', Hm, q blocks]");
  check_int32(op, "idx", idx, 1, "[entries]");
  check(shape_of(cnt) == shape_of(ptr) && shape_of(nmask) == shape_of(ptr), op,
        "row_ptr, row_cnt and row_nmask must have one shape, got ", show(ptr), ", ", show(cnt), " and ", show(nmask));
  check(ptr.is_contiguous() && cnt.is_contiguous() && nmask.is_contiguous() && idx.is_contiguous(), op,
        "row_ptr, row_cnt, row_nmask and idx must be contiguous");
  BlockRows rows = {};
  if (bit_id) {
    check_int32(op, "bit_id", *bit_id, 1, "[entries]");
    check(bit_id->size(0) == idx.size(0) && bit_id->is_contiguous(), op, "bit_id must be a contiguous [", idx.size(0),
          "], got ", show(*bit_id));
    rows.rows.bit_id = bit_id->const_data_ptr<int32_t>();
  }
  rows.rows.ptr = ptr.const_data_ptr<int32_t>();
  rows.rows.cnt = cnt.const_data_ptr<int32_t>();
  rows.rows.nmask = nmask.const_data_ptr<int32_t>();
  rows.rows.idx = idx.const_data_ptr<int32_t>();
  rows.rows.capacity = idx.size(0);
  rows.rows.blocks = ptr.size(2);
  rows.batches = ptr.size(0);
  rows.heads = ptr.size(1);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> transpose(const Tensor& ptr, const Tensor& cnt, const Tensor& nmask,
                                                             const Tensor& idx, int64_t N, int64_t Sk,
                                                             std::optional<Tensor> bit_id) {
  const char* op = "layout_transpose";
  const Tiling t = make_tiling(op, 64, N, 0, Sk);
  BlockRows in = as_block_rows(op, ptr, cnt, nmask, idx, bit_id);
  in.block_n = in.unit = N;
  in.bit_tiles = kInt32Max;
  const std::string fault = cpu::layout_fault(in, Sk);
  check(fault.empty(), op, fault);
  const Shape columns = {in.batches, in.heads, t.k_blocks()};
  const Tensor t_ptr = empty_like_shape(ptr, columns), t_cnt = empty_like_shape(ptr, columns),
               t_nmask = empty_like_shape(ptr, columns), t_idx = empty_like_shape(idx, shape_of(idx)),
               t_bit_id = empty_like_shape(idx, {bit_id ? idx.size(0) : 0});
  const TransposedLists out = {ints(t_ptr), ints(t_cnt), ints(t_nmask), ints(t_idx), bit_id ? ints(t_bit_id) : nullptr};
  cpu::layout_transpose(in, out, t.k_blocks());
  return {t_ptr, t_cnt, t_nmask, t_idx, t_bit_id};
}

// lo or hi: a value for each query, shared over batches or heads where the extent is 1.
void check_bound(const char* op, const char* name, const std::optional<Tensor>& bound, const BlockRows& in,
                 int64_t Sq) {
  if (!bound) return;
  check_int32(op, name, *bound, 3, "[B' or 1, Hm or 1, Sq]");
  const bool batches = bound->size(0) == 1 || bound->size(0) == in.batches || in.batches == 1,
             heads = bound->size(1) == 1 || bound->size(1) == in.heads;
  check(batches && heads && bound->size(2) == Sq, op, name, " must be [", in.batches, " or 1, ", in.heads, " or 1, ",
        Sq, "], got ", show(*bound));
}

void check_layout(const Tensor& ptr, const Tensor& cnt, const Tensor& nmask, const Tensor& idx, int64_t M, int64_t N,
                  int64_t unit, int64_t Sq, int64_t Sk, std::optional<Tensor> lo, std::optional<Tensor> hi,
                  int64_t sink, std::optional<Tensor> bits, std::optional<Tensor> bit_id, std::optional<Tensor> col_ptr,
                  std::optional<Tensor> col_idx) {
  const char* op = "layout_check";
  const Tiling t = make_tiling(op, M, N, Sq, Sk);
  check(unit == 1 || unit == N, op, "unit must be 1 or block_n = ", N, ", got ", unit);
  BlockRows in = as_block_rows(op, ptr, cnt, nmask, idx, bit_id);
  check(in.rows.blocks == t.q_blocks(), op, "row_ptr must be [B', Hm, ", t.q_blocks(), "], got ", show(ptr));
  in.block_m = M;
  in.block_n = N;
  in.unit = unit;
  check_bound(op, "lo", lo, in, Sq);
  check_bound(op, "hi", hi, in, Sq);
  check(sink >= 0, op, "sink must not be negative, got ", sink);
  check(bits.has_value() == bit_id.has_value(), op, "bits and bit_id go together");
  if (bits) {
    check_int32(op, "bits", *bits, 3, "[tiles, block_m, block_n / 32]");
    check(bits->size(1) == M && bits->size(2) == N / 32, op, "bits must be [tiles, ", M, ", ", N / 32, "], got ",
          show(*bits));
    in.bit_tiles = bits->size(0);
  }
  check(col_ptr.has_value() == col_idx.has_value(), op, "col_ptr and col_idx go together");
  if (col_ptr) {
    check_int32(op, "col_ptr", *col_ptr, 1, "[rows + 1]");
    check_int32(op, "col_idx", *col_idx, 1, "[columns]");
    check(col_ptr->size(0) == ptr.numel() + 1, op, "col_ptr must be [", ptr.numel() + 1, "], got ", show(*col_ptr));
    check(col_ptr->is_contiguous() && col_idx->is_contiguous(), op, "col_ptr and col_idx must be contiguous");
    in.col_ptr = col_ptr->const_data_ptr<int32_t>();
    in.col_idx = col_idx->const_data_ptr<int32_t>();
    in.columns = col_idx->size(0);
  }
  const std::string fault = cpu::layout_fault(in, Sk);
  check(fault.empty(), op, fault);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("layout_from_block_mask", TORCH_BOX(&from_block_mask));
  m.impl("layout_from_topk", TORCH_BOX(&from_topk));
  m.impl("layout_from_interval", TORCH_BOX(&from_interval));
  m.impl("layout_from_cu_seqlens", TORCH_BOX(&from_cu_seqlens));
  m.impl("layout_from_vertical_slash", TORCH_BOX(&from_vertical_slash));
  m.impl("layout_from_dense_mask", TORCH_BOX(&from_dense_mask));
  m.impl("layout_from_tree", TORCH_BOX(&from_tree));
  m.impl("layout_transpose", TORCH_BOX(&transpose));
  m.impl("layout_check", TORCH_BOX(&check_layout));
}

}  // namespace slk
