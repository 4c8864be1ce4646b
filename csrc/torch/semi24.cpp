// Pruning to 2:4 and packing at the torch boundary.
#include "torch/semi24.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "torch/device.h"

namespace slk {
namespace {

using MaybeTensor = std::optional<Tensor>;

int bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

std::string show(const Shape& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t d = 0; d < shape.size(); ++d) out << (d ? ", " : "") << shape[d];
  out << ']';
  return out.str();
}

void check_shape(const char* op, const char* name, const Tensor& t, const Shape& shape) {
  check(shape_of(t) == shape, op, name, " must be ", show(shape), ", got ", slk::show(t));
}

Prune24 prune24_of(const char* op, const std::string& by) {
  check(by == "row" || by == "transposable", op, "by must be row or transposable, got ", by);
  return by == "row" ? Prune24::rows : Prune24::transposable;
}

const char* name_of(Layout24 layout) {
  return layout == Layout24::plain ? "plain" : layout == Layout24::sm80 ? "sm80" : "sm90";
}

// The element type of a weight in `layout`.
DType check_dtype(const char* op, const char* name, const Tensor& t, Layout24 layout) {
  const DType dtype = dtype_of(op, name, t);
  check(layout == Layout24::plain || dtype == DType::bf16 || dtype == DType::f16, op, "layout ", name_of(layout),
        " needs bfloat16 or float16, got ", slk::show(t.scalar_type()));
  check(!is_cuda(t) || dtype != DType::f64, op, name, " must be float32, bfloat16 or float16 on a GPU, got float64");
  return dtype;
}

Shape values_shape(int64_t n, int64_t m, Layout24 layout) {
  return {padded_rows24(layout, n), padded_columns24(layout, m) / 2};
}
Shape meta_shape(int64_t n, int64_t m, Layout24 layout) {
  const int64_t rows = padded_rows24(layout, n), columns = padded_columns24(layout, m);
  switch (layout) {
    case Layout24::plain:
      return {n, ceil_div(m, 8)};
    case Layout24::sm80:
      return {rows, columns / 16};
    case Layout24::sm90:
      return {rows * columns / 8};
  }
  return {};
}
ScalarType meta_type(Layout24 layout) {
  return layout == Layout24::sm80 ? ScalarType::Short : ScalarType::Byte;
}

void check_size(const char* op, int64_t n, int64_t m) {
  check(n >= 0 && m >= 0, op, "n and m must not be negative, got ", n, " and ", m);
}

// W and what ranks it, contiguous.
struct Scored {
  Tensor W, score;
};
Scored check_scored(const char* op, const Tensor& W, const MaybeTensor& score, Layout24 layout) {
  check(W.dim() == 2, op, "W must be [n, m], got ", slk::show(W));
  check_dtype(op, "W", W, layout);
  const Tensor w = as_contiguous(W);
  if (!score) return {w, w};
  check_shape(op, "score", *score, shape_of(W));
  check_same_dtype(op, "score", *score, "W", W);
  check_same_device(op, "score", *score, "W", W);
  return {w, as_contiguous(*score)};
}

// body(range of rows) in parallel, rows of `columns` elements.
template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, columns));
  parallel_for(rows, grain, [&](int64_t b, int64_t e) { body(Range{b, e}); });
}
// body(range of rows of tiles), in whole units of kTileRows24.
template <class F>
void parallel_tiles(int64_t n, int64_t m, const F& body) {
  using cpu::kTileRows24;
  parallel_rows(ceil_div(n, 4 * kTileRows24), 4 * kTileRows24 * m,
                [&](Range units) { body(Range{units.begin * kTileRows24, units.end * kTileRows24}); });
}
// The least of the faults (a group's number, or -1) that body(range) finds.
template <class F>
int64_t first_fault(int64_t rows, int64_t columns, const F& body) {
  constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first{none};
  parallel_rows(rows, columns, [&](Range range) {
    const int64_t found = body(range);
    int64_t before = first.load();
    while (found >= 0 && found < before && !first.compare_exchange_weak(before, found)) {
    }
  });
  return first == none ? -1 : first.load();
}

// "row 3, columns 8 to 11" of an [n, m] weight.
std::string place_of(int64_t group, int64_t m) {
  const int64_t row = group / groups24(m), column = 4 * (group % groups24(m));
  std::ostringstream out;
  out << "row " << row << ", columns " << column << " to " << std::min(column + 3, m - 1);
  return out.str();
}

}  // namespace

// ---- packed weights -------------------------------------------------------------------------------------------------

Layout24 layout24_of(const char* op, const char* argument, const std::string& name) {
  check(name == "plain" || name == "sm80" || name == "sm90", op, argument, " must be plain, sm80 or sm90, got ", name);
  return name == "plain" ? Layout24::plain : name == "sm80" ? Layout24::sm80 : Layout24::sm90;
}

Tensor check_meta24(const char* op, const char* name, const Tensor& meta, int64_t n, int64_t m, Layout24 layout) {
  check_size(op, n, m);
  check_shape(op, name, meta, meta_shape(n, m, layout));
  check(meta.scalar_type() == meta_type(layout), op, name, " must be ", slk::show(meta_type(layout)), ", got ",
        slk::show(meta.scalar_type()));
  return as_contiguous(meta);
}

PackedTensors24 check_packed24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                               Layout24 layout) {
  check_dtype(op, "values", values, layout);
  const Tensor contiguous_meta = check_meta24(op, "meta", meta, n, m, layout);
  check_shape(op, "values", values, values_shape(n, m, layout));
  check_same_device(op, "meta", meta, "values", values);
  return {as_contiguous(values), contiguous_meta};
}

PackedTensors24 new_packed24(const Tensor& like, int64_t n, int64_t m, Layout24 layout) {
  PackedTensors24 t = {empty_like_shape(like, values_shape(n, m, layout)),
                       empty_like_shape(like, meta_shape(n, m, layout), meta_type(layout))};
  const bool padded = padded_rows24(layout, n) != n || padded_columns24(layout, m) != 4 * groups24(m);
  if (padded && !is_cuda(like) && t.meta.numel() > 0) {  // of nothing there is no address
    torch::stable::zero_(t.values);
    std::memset(t.meta.mutable_data_ptr(), 0x44, view24(t, n, m, layout).meta_bytes());
  }
  return t;
}

Packed24 view24(const PackedTensors24& t, int64_t n, int64_t m, Layout24 layout) {
  return {t.values.defined() ? t.values.mutable_data_ptr() : nullptr, t.meta.mutable_data_ptr(), layout, n, m};
}

namespace {

// ---- prune24, prune_compress24 --------------------------------------------------------------------------------------

Tensor prune24(const Tensor& W, Text by, MaybeTensor score) {
  constexpr const char* op = "prune24";
  const Scored in = check_scored(op, W, score, Layout24::plain);
  const Prune24 how = prune24_of(op, by);
  const int64_t n = W.size(0), m = W.size(1);
  const Tensor mask = empty_like_shape(W, {n, m}, ScalarType::Bool);
  if (n == 0 || m == 0) return mask;
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(W)) {
    const DeviceScope scope(W);
    cuda::prune24(in.score, how, mask);
    return mask;
  }
#endif
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  parallel_tiles(n, m, [&](Range tiles) {
    cpu::pack24_kernels().prune(dtype_of(op, "W", W), in.score.const_data_ptr(), n, m, how, tiles, out);
  });
  return mask;
}

// A new [n, m] weight and its transpose.
struct BothWays {
  PackedTensors24 t, t_t;
  Packed24 pack, pack_t;

  BothWays(const Tensor& like, Layout24 layout)
      : t(new_packed24(like, like.size(0), like.size(1), layout)),
        t_t(new_packed24(like, like.size(1), like.size(0), layout)),
        pack(view24(t, like.size(0), like.size(1), layout)),
        pack_t(view24(t_t, like.size(1), like.size(0), layout)) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const { return {t.values, t.meta, t_t.values, t_t.meta}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_compress24(const Tensor& W, Text by, MaybeTensor score,
                                                            Text layout_name) {
  constexpr const char* op = "prune_compress24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  const Scored in = check_scored(op, W, score, layout);
  const Prune24 how = prune24_of(op, by);
  const BothWays out(W, layout);
  if (W.numel() == 0) return out.tensors();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(W)) {
    const DeviceScope scope(W);
    cuda::prune_compress24(in.W, in.score, how, out.pack, out.pack_t);
    return out.tensors();
  }
#endif
  parallel_tiles(W.size(0), W.size(1), [&](Range tiles) {
    cpu::pack24_kernels().prune_compress(dtype_of(op, "W", W), in.W.const_data_ptr(), in.score.const_data_ptr(), how,
                                         tiles, out.pack, out.pack_t);
  });
  return out.tensors();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relu2_prune24(const Tensor& x, Text layout_name) {
  constexpr const char* op = "relu2_prune24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  check(x.dim() == 2, op, "x must be [tokens, m], got ", slk::show(x));
  const DType dtype = check_dtype(op, "x", x, layout);
  const Tensor from = as_contiguous(x);
  const BothWays out(x, layout);
  if (x.numel() == 0) return out.tensors();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(x)) {
    const DeviceScope scope(x);
    cuda::relu2_prune24(from, out.pack, out.pack_t);
    return out.tensors();
  }
#endif
  parallel_tiles(x.size(0), x.size(1), [&](Range tiles) {
    cpu::pack24_kernels().relu2_prune(dtype, from.const_data_ptr(), tiles, out.pack, out.pack_t);
  });
  return out.tensors();
}

// ---- compress24, decompress24 ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> compress24(const Tensor& W, const Tensor& mask, Text layout_name, bool validate) {
  constexpr const char* op = "compress24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  const Tensor w = check_scored(op, W, std::nullopt, layout).W;
  check_shape(op, "mask", mask, shape_of(W));
  check(mask.scalar_type() == ScalarType::Bool, op, "mask must be bool, got ", slk::show(mask.scalar_type()));
  check_same_device(op, "mask", mask, "W", W);
  const Tensor bools = as_contiguous(mask);
  const int64_t n = W.size(0), m = W.size(1);
  const PackedTensors24 t = new_packed24(W, n, m, layout);
  if (n == 0 || m == 0) return {t.values, t.meta};
  const Packed24 pack = view24(t, n, m, layout);
  int64_t fault = -1;
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(W)) {
    const DeviceScope scope(W);
    if (validate) fault = cuda::check_mask24(bools);
    if (fault < 0) cuda::compress24(w, bools, pack);
  }
#endif
  if (!is_cuda(W))
    fault = first_fault(n, m, [&](Range rows) {
      return cpu::compress24(dtype_of(op, "W", W), w.const_data_ptr(),
                             static_cast<const uint8_t*>(bools.const_data_ptr()), pack, rows);
    });
  check(!validate || fault < 0, op, "mask must keep two of every four columns, which it does not in ",
        fault < 0 ? "" : place_of(fault, m));
  return {t.values, t.meta};
}

Tensor decompress24(const Tensor& values, const Tensor& meta, int64_t n, int64_t m, Text layout_name) {
  constexpr const char* op = "decompress24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  const PackedTensors24 t = check_packed24(op, values, meta, n, m, layout);
  const Tensor W = empty_like_shape(values, {n, m});
  if (n == 0 || m == 0) return W;
  const Packed24 pack = view24(t, n, m, layout);
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(values)) {
    const DeviceScope scope(values);
    cuda::decompress24(pack, W);
    return W;
  }
#endif
  const int bytes = bytes_of(dtype_of(op, "values", values));
  parallel_rows(n, m, [&](Range rows) { cpu::decompress24(bytes, pack, rows, W.mutable_data_ptr()); });
  return W;
}

// ---- mask_of24, check24 ---------------------------------------------------------------------------------------------

Tensor mask_of24(const Tensor& meta, int64_t n, int64_t m, Text layout_name) {
  constexpr const char* op = "mask_of24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  const Tensor codes = check_meta24(op, "meta", meta, n, m, layout);
  const Tensor mask = empty_like_shape(meta, {n, m}, ScalarType::Bool);
  if (n == 0 || m == 0) return mask;
  const Packed24 pack = view24({Tensor(), codes}, n, m, layout);
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(meta)) {
    const DeviceScope scope(meta);
    cuda::mask_of24(pack, mask);
    return mask;
  }
#endif
  parallel_rows(n, m, [&](Range rows) { cpu::mask_of24(pack, rows, static_cast<uint8_t*>(mask.mutable_data_ptr())); });
  return mask;
}

void check24(const Tensor& meta, int64_t n, int64_t m, Text layout_name) {
  constexpr const char* op = "check24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  const Tensor codes = check_meta24(op, "meta", meta, n, m, layout);
  if (n == 0 || m == 0) return;
  const Packed24 pack = view24({Tensor(), codes}, n, m, layout);
  int64_t fault = -1;
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(meta)) {
    const DeviceScope scope(meta);
    fault = cuda::check24(pack, codes);
  }
#endif
  if (!is_cuda(meta)) fault = first_fault(n, m, [&](Range rows) { return cpu::check24(pack, rows); });
  check(fault < 0, op, "meta must hold codes 0x4, 0x8, 0x9, 0xC, 0xD and 0xE, which it does not for ",
        fault < 0 ? "" : place_of(fault, m));
}

// ---- convert24 ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> convert24(const Tensor& values, const Tensor& meta, int64_t n, int64_t m, Text source_name,
                                     Text target_name) {
  constexpr const char* op = "convert24";
  const Layout24 source = layout24_of(op, "source", source_name), target = layout24_of(op, "target", target_name);
  check_dtype(op, "values", values, target);
  const PackedTensors24 from = check_packed24(op, values, meta, n, m, source), to = new_packed24(values, n, m, target);
  if (n == 0 || m == 0) return {to.values, to.meta};
  const Packed24 in = view24(from, n, m, source), out = view24(to, n, m, target);
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(values)) {
    const DeviceScope scope(values);
    cuda::convert24(from.values, in, out);
    return {to.values, to.meta};
  }
#endif
  const int bytes = bytes_of(dtype_of(op, "values", values));
  parallel_rows(n, m, [&](Range rows) { cpu::convert24(bytes, in, out, rows); });
  return {to.values, to.meta};
}

// ---- repack24_perm, repack24_t_ -------------------------------------------------------------------------------------

Tensor repack24_perm(const Tensor& meta, const Tensor& meta_t, int64_t n, int64_t m) {
  constexpr const char* op = "repack24_perm";
  const Tensor codes = check_meta24(op, "meta", meta, n, m, Layout24::plain);
  const Tensor codes_t = check_meta24(op, "meta_t", meta_t, m, n, Layout24::plain);
  check_same_device(op, "meta_t", meta_t, "meta", meta);
  check(n * kept24(m) <= std::numeric_limits<int32_t>::max(), op, "more than 2^31 - 1 values (", n * kept24(m),
        ") do not fit int32 positions");
  const Tensor perm = empty_like_shape(meta, {m, kept24(n)}, ScalarType::Int);
  if (n == 0 || m == 0) return perm;
  const Packed24 pack = view24({Tensor(), codes}, n, m, Layout24::plain);
  const Packed24 pack_t = view24({Tensor(), codes_t}, m, n, Layout24::plain);
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(meta)) {
    const DeviceScope scope(meta);
    cuda::repack24_perm(pack, pack_t, perm);
    return perm;
  }
#endif
  parallel_rows(m, n, [&](Range rows) { cpu::repack24_perm(pack, pack_t, rows, perm.mutable_data_ptr<int32_t>()); });
  return perm;
}

void repack24_t_(const Tensor& values_t, const Tensor& values, const Tensor& perm) {
  constexpr const char* op = "repack24_t_";
  check(values_t.dim() == 2, op, "values_t must be [m, 2 ceil(n / 4)], got ", slk::show(values_t));
  check(values.dim() == 2, op, "values must be [n, 2 ceil(m / 4)], got ", slk::show(values));
  check(values_t.is_contiguous(), op, "values_t must be contiguous");
  const DType dtype = check_dtype(op, "values_t", values_t, Layout24::plain);
  check_same_dtype(op, "values", values, "values_t", values_t);
  check_same_device(op, "values", values, "values_t", values_t);
  check_shape(op, "perm", perm, shape_of(values_t));
  check(perm.scalar_type() == ScalarType::Int, op, "perm must be int32, got ", slk::show(perm.scalar_type()));
  check_same_device(op, "perm", perm, "values_t", values_t);
  const Tensor from = as_contiguous(values), at = as_contiguous(perm);
  const int64_t rows = values_t.size(0), columns = values_t.size(1);
  if (rows == 0 || columns == 0) return;
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(values_t)) {
    const DeviceScope scope(values_t);
    cuda::repack24_t(from, at, values_t);
    return;
  }
#endif
  parallel_rows(rows, columns, [&](Range range) {
    cpu::repack24_t(bytes_of(dtype), from.const_data_ptr(), values.size(0) * values.size(1),
                    at.const_data_ptr<int32_t>(), columns, range, values_t.mutable_data_ptr());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("prune24", TORCH_BOX(&prune24));
  m.impl("prune_compress24", TORCH_BOX(&prune_compress24));
  m.impl("relu2_prune24", TORCH_BOX(&relu2_prune24));
  m.impl("compress24", TORCH_BOX(&compress24));
  m.impl("decompress24", TORCH_BOX(&decompress24));
  m.impl("mask_of24", TORCH_BOX(&mask_of24));
  m.impl("check24", TORCH_BOX(&check24));
  m.impl("convert24", TORCH_BOX(&convert24));
  m.impl("repack24_perm", TORCH_BOX(&repack24_perm));
  m.impl("repack24_t_", TORCH_BOX(&repack24_t_));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("prune24", TORCH_BOX(&prune24));
  m.impl("prune_compress24", TORCH_BOX(&prune_compress24));
  m.impl("relu2_prune24", TORCH_BOX(&relu2_prune24));
  m.impl("compress24", TORCH_BOX(&compress24));
  m.impl("decompress24", TORCH_BOX(&decompress24));
  m.impl("mask_of24", TORCH_BOX(&mask_of24));
  m.impl("check24", TORCH_BOX(&check24));
  m.impl("convert24", TORCH_BOX(&convert24));
  m.impl("repack24_perm", TORCH_BOX(&repack24_perm));
  m.impl("repack24_t_", TORCH_BOX(&repack24_t_));
}
#endif

}  // namespace slk
