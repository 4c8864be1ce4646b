// Products of family `semi24` on CUDA: checks, layouts, and which kernel multiplies (docs/semi24_cuda.md).
#ifdef SLKERNELS_WITH_CUDA
#include <algorithm>

#include "slkernels/semi24_cuda.h"
#include "torch/gemm.h"
#include "torch/lowrank.h"
#include "torch/semi24_linear.h"
#include "torch/stream.h"

namespace slk {
namespace {

// Rows of the dense dW that panels_dw holds at a time: enough for the dense library to fill the device, few enough
// for the panel to be read again from L2.
constexpr int64_t kPanelRows = 1024;

struct Device {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  explicit Device(const Tensor& t) : index(t.get_device_index()), guard(index) {}
  cudaStream_t stream(const char* op) const { return current_stream(op, index); }
};

// W [n, m] in one of the layouts; contiguous, bases at multiples of 16 bytes.
struct Packed {
  Tensor values, meta;
  Layout24 layout;
  int64_t n, m;
};

struct Epilogue {
  std::optional<Tensor> bias;
  Activation24 activation;
};

Tensor aligned(const Tensor& t) {
  const Tensor dense = as_contiguous(t);
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0) return dense;
  Tensor copy = empty_like_shape(t, shape_of(t));
  return torch::stable::copy_(copy, dense);
}

DType float_of(const char* op, const char* name, const Tensor& t) {
  const DType dtype = dtype_of(op, name, t);
  check(dtype != DType::f64, op, name, " must be float32, bfloat16 or float16 on CUDA, got float64");
  return dtype;
}

bool is_half(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

// ---- layouts --------------------------------------------------------------------------------------------------------

Packed empty_pack(const Tensor& like, Layout24 layout, int64_t n, int64_t m) {
  const int64_t rows = padded_rows24(layout, n), columns = padded_columns24(layout, m);
  const Tensor values = empty_like_shape(like, {rows, columns / 2});
  if (layout == Layout24::sm80)
    return {values, empty_like_shape(like, {rows, columns / 16}, ScalarType::Short), layout, n, m};
  return {values, empty_like_shape(like, {rows * columns / 8}, ScalarType::Byte), layout, n, m};
}

// W with zeros where it was pruned.
Tensor dense_weight(const char* op, const Device& device, const Packed& w) {
  const Tensor dense = empty_like_shape(w.values, {w.n, w.m});
  check_cuda(op, cuda::launch_decompress24(dtype_of(op, "values", w.values), w.values.const_data_ptr(),
                                           w.meta.const_data_ptr(), w.n, w.m, w.layout, dense.mutable_data_ptr(),
                                           device.stream(op)));
  return dense;
}

void check_pack(const char* op, const Tensor& values, const Tensor& meta, Layout24 layout, int64_t n, int64_t m,
                const Tensor& x) {
  if (layout == Layout24::plain) return check_plain24(op, values, meta, n, m, x);
  const int64_t rows = padded_rows24(layout, n), columns = padded_columns24(layout, m);
  check(n >= 0, op, "n must not be negative, got ", n);
  check(is_half(x), op, "x must be bfloat16 or float16 for a packed layout, got ", show(x.scalar_type()));
  check(values.dim() == 2 && values.size(0) == rows && values.size(1) == columns / 2, op, "values must be [", rows,
        ", ", columns / 2, "] for W [", n, ", ", m, "], got ", show(values));
  check_same_dtype(op, "values", values, "x", x);
  check_same_device(op, "values", values, "x", x);
  check_same_device(op, "meta", meta, "x", x);
  if (layout == Layout24::sm80) {
    check(meta.dim() == 2 && meta.size(0) == rows && meta.size(1) == columns / 16, op, "meta must be [", rows, ", ",
          columns / 16, "] for W [", n, ", ", m, "], got ", show(meta));
    check(meta.scalar_type() == ScalarType::Short, op, "meta must be int16, got ", show(meta.scalar_type()));
  } else {
    check(meta.dim() == 1 && meta.size(0) == rows * columns / 8, op, "meta must be [", rows * columns / 8, "] for W [",
          n, ", ", m, "], got ", show(meta));
    check(meta.scalar_type() == ScalarType::Byte, op, "meta must be uint8, got ", show(meta.scalar_type()));
  }
}

int64_t columns_of(const char* op, const char* name, const Tensor& x) {
  check(x.dim() >= 1, op, name, " must have at least one dimension, got ", show(x));
  return x.size(x.dim() - 1);
}

// ---- products -------------------------------------------------------------------------------------------------------

Tensor activated(Activation24 activation, const Tensor& z) {
  switch (activation) {
    case Activation24::relu:
      return aten("aten::relu", "", z);
    case Activation24::silu:
      return aten("aten::silu", "", z);
    case Activation24::gelu:
      return aten("aten::gelu", "", z, std::string("none"));
    case Activation24::relu2: {
      const Tensor positive = aten("aten::relu", "", z);
      return aten("aten::mul", "Tensor", positive, positive);
    }
    case Activation24::none:
      break;
  }
  return z;
}

Tensor dense_product(const char* op, const Device& device, const Tensor& x, const Packed& w, const Epilogue& end) {
  const Tensor y = linear(x, dense_weight(op, device, w), 1, end.bias ? &*end.bias : nullptr);
  return activated(end.activation, y);
}

// On the sparse tensor cores; w in a packed layout.
Tensor sparse_product(const char* op, const Device& device, const Tensor& x, const Packed& w, const Epilogue& end) {
  const bool sm90 = w.layout == Layout24::sm90;
  const int64_t tokens = x.size(0);
  const Tensor rows = with_aligned_rows(x);
  const Tensor bias = end.bias ? as_contiguous(*end.bias) : Tensor();
  const int64_t ld_y = sm90 ? round_up(w.n, 8) : w.n;  // TMA stores rows that start at multiples of 16 bytes
  Tensor y = empty_like_shape(x, {tokens, ld_y});
  const cuda::Linear24Args args = {w.values.const_data_ptr(),
                                   w.meta.const_data_ptr(),
                                   rows.const_data_ptr(),
                                   end.bias ? bias.const_data_ptr() : nullptr,
                                   y.mutable_data_ptr(),
                                   w.n,
                                   w.m,
                                   tokens,
                                   row_distance(rows),
                                   ld_y,
                                   end.activation};
  const DType dtype = dtype_of(op, "x", x);
  check_cuda(op, (sm90 ? cuda::launch_linear24_sm90 : cuda::launch_linear24_sm80)(dtype, args, device.stream(op)));
  return ld_y == w.n ? y : torch::stable::contiguous(torch::stable::narrow(y, 1, 0, w.n));
}

Layout24 layout_of_device(const char* op, const Device& device) {
  return picks_sm90(op, "auto", device.index) ? Layout24::sm90 : Layout24::sm80;
}

// w as the device's kernel reads it. Layout sm80 runs on every GPU from compute capability 8.0 on, sm90 on 9.0 only.
Packed for_device(const char* op, const Device& device, const Packed& w) {
  const Layout24 own = layout_of_device(op, device);
  check(w.layout != Layout24::sm90 || own == Layout24::sm90, op,
        "layout sm90 needs a GPU of compute capability 9.0; convert24 to sm80");
  if (w.layout != Layout24::plain) return w;
  const Packed out = empty_pack(w.values, own, w.n, w.m);
  check_cuda(op, cuda::launch_convert24(dtype_of(op, "values", w.values), w.values.const_data_ptr(),
                                        w.meta.const_data_ptr(), w.n, w.m, w.layout, own, out.values.mutable_data_ptr(),
                                        out.meta.mutable_data_ptr(), device.stream(op)));
  return out;
}

Tensor product(const char* op, const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, Layout24 layout,
               const std::optional<Tensor>& bias, const std::string& activation) {
  const Epilogue end = {bias, activation24_of(op, activation)};
  const int64_t m = columns_of(op, "x", x);
  float_of(op, "x", x);
  check_pack(op, values, meta, layout, n, m, x);
  check_bias24(op, bias, n, x);
  const Device device(x);
  const Tensor x2 = as_tokens(op, "x", x, m);
  const Packed w = {aligned(values), aligned(meta), layout, n, m};
  const int64_t tokens = x2.size(0);
  // What is packed already is multiplied as it is: to decompress it first costs more than any dense product gains.
  const bool sparse =
      is_half(x) && tokens > 0 && n > 0 && m > 0 && (layout != Layout24::plain || sparse_pays24(tokens, n, m));
  const Tensor y =
      sparse ? sparse_product(op, device, x2, for_device(op, device, w), end) : dense_product(op, device, x2, w, end);
  Shape shape = shape_of(x);
  shape.back() = n;
  return torch::stable::view(y, {shape.data(), shape.size()});
}

Tensor linear24(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, std::optional<Tensor> bias,
                std::string activation) {
  return product("linear24", x, values, meta, n, Layout24::plain, bias, activation);
}

Tensor linear24_packed(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, std::string layout,
                       std::optional<Tensor> bias, std::string activation) {
  const char* op = "linear24_packed";
  return product(op, x, values, meta, n, layout24_of(op, layout), bias, activation);
}

// dx = dy W without a transposed pack: a dense product.
Tensor linear24_dx(const Tensor& dy, const Tensor& values, const Tensor& meta, int64_t m) {
  const char* op = "_linear24_dx";
  float_of(op, "dy", dy);
  const int64_t n = columns_of(op, "dy", dy);
  check_plain24(op, values, meta, n, m, dy);
  const Device device(dy);
  const Tensor w = dense_weight(op, device, {aligned(values), aligned(meta), Layout24::plain, n, m});
  const Tensor dx = linear(as_tokens(op, "dy", dy, n), t2(w), 1, nullptr);
  Shape shape = shape_of(dy);
  shape.back() = m;
  return torch::stable::view(dx, {shape.data(), shape.size()});
}

struct Gradient {
  Tensor dy, x, meta, dvalues;
  Layout24 layout;
  int64_t n, m;
};

// The kernel that keeps the slots of its own accumulators.
void fused_dw(const char* op, const Device& device, const Gradient& g) {
  const Tensor dy = with_aligned_rows(g.dy), x = with_aligned_rows(g.x);
  const cuda::DwCompress24Args args = {dy.const_data_ptr(),
                                       x.const_data_ptr(),
                                       g.meta.const_data_ptr(),
                                       g.dvalues.mutable_data_ptr(),
                                       g.n,
                                       g.m,
                                       x.size(0),
                                       row_distance(dy),
                                       row_distance(x),
                                       g.layout};
  check_cuda(op, cuda::launch_dw_compress24_sm80(dtype_of(op, "x", x), args, device.stream(op)));
}

// dW by the dense library, a panel of rows at a time, of which a kernel keeps the slots.
void panels_dw(const char* op, const Device& device, const Gradient& g) {
  const int64_t stored_rows = padded_rows24(g.layout, g.n);
  Tensor panel = empty_like_shape(g.x, {std::min(kPanelRows, g.n), g.m}), dy_t = t2(g.dy);
  for (int64_t row = 0; row < stored_rows; row += kPanelRows) {
    const int64_t rows = std::clamp<int64_t>(g.n - row, 0, kPanelRows);  // of W; the rest is padding
    const Tensor dw = torch::stable::narrow(panel, 0, 0, rows);
    if (rows > 0) addmm_out(dw, dw, torch::stable::narrow(dy_t, 0, row, rows), g.x, 0, 1);
    check_cuda(op, cuda::launch_gather24(dtype_of(op, "x", g.x), panel.const_data_ptr(), g.meta.const_data_ptr(), g.n,
                                         g.m, g.layout, {row, std::min(stored_rows, row + kPanelRows)},
                                         g.dvalues.mutable_data_ptr(), device.stream(op)));
  }
}

Tensor dw_compress24(const Tensor& dy, const Tensor& x, const Tensor& meta, std::string layout_name) {
  const char* op = "dw_compress24";
  const Layout24 layout = layout24_of(op, layout_name);
  float_of(op, "x", x);
  const int64_t n = columns_of(op, "dy", dy), m = columns_of(op, "x", x);
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_device(op, "dy", dy, "x", x);
  const Tensor dy2 = as_tokens(op, "dy", dy, n), x2 = as_tokens(op, "x", x, m);
  check(dy2.size(0) == x2.size(0), op, "dy must have x's tokens, got dy ", show(dy), " and x ", show(x));
  const Tensor dvalues = empty_like_shape(x, {padded_rows24(layout, n), padded_columns24(layout, m) / 2});
  check_pack(op, dvalues, meta, layout, n, m, x);
  const Device device(x);
  const Gradient g = {dy2, x2, aligned(meta), dvalues, layout, n, m};
  // The kernel is mma.sync's; on 9.0 the dense library has wgmma, of twice the rate.
  const bool fused = is_half(x) && layout_of_device(op, device) == Layout24::sm80;
  (fused ? fused_dw : panels_dw)(op, device, g);
  return dvalues;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("linear24", TORCH_BOX(&linear24));
  m.impl("linear24_packed", TORCH_BOX(&linear24_packed));
  m.impl("_linear24_dx", TORCH_BOX(&linear24_dx));
  m.impl("dw_compress24", TORCH_BOX(&dw_compress24));
}

}  // namespace slk
#endif
