// Products of family `semi24` on CUDA: checks, layouts, and which kernel multiplies (docs/semi24_cuda.md).
#ifdef SLKERNELS_WITH_CUDA
#include <algorithm>

#include "slkernels/semi24_gather.h"
#include "torch/gemm.h"
#include "torch/lowrank.h"
#include "torch/semi24.h"
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

// W [n, m], contiguous, bases at multiples of 16 bytes.
struct Weight {
  PackedTensors24 at;
  Layout24 layout;
  int64_t n, m;
  Packed24 view() const { return view24(at, n, m, layout); }
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

void check_float(const char* op, const char* name, const Tensor& t) {
  check(dtype_of(op, name, t) != DType::f64, op, name, " must be float32, bfloat16 or float16 on a GPU, got float64");
}

bool is_half(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

// ---- layouts --------------------------------------------------------------------------------------------------------

Weight check_weight(const char* op, const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                    Layout24 layout) {
  const PackedTensors24 at = check_weight24(op, values, meta, n, m, layout, x);
  return {{aligned(at.values), aligned(at.meta)}, layout, n, m};
}

Layout24 layout_of_device(const char* op, const Device& device) {
  return picks_sm90(op, "auto", device.index) ? Layout24::sm90 : Layout24::sm80;
}

// w as the device's kernel reads it. Layout sm80 runs on every GPU from compute capability 8.0 on, sm90 on 9.0 only.
Weight for_device(const char* op, const Device& device, const Weight& w) {
  const Layout24 own = layout_of_device(op, device);
  check(w.layout != Layout24::sm90 || own == Layout24::sm90, op,
        "layout sm90 needs a GPU of compute capability 9.0; convert24 to sm80");
  if (w.layout != Layout24::plain) return w;
  const Weight out = {new_packed24(w.at.values, w.n, w.m, own), own, w.n, w.m};
  cuda::convert24(w.at.values, w.view(), out.view());
  return out;
}

// W with zeros where it was pruned.
Tensor dense_weight(const Weight& w) {
  const Tensor dense = empty_like_shape(w.at.values, {w.n, w.m});
  if (w.n > 0 && w.m > 0) cuda::decompress24(w.view(), dense);
  return dense;
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

Tensor dense_product(const Tensor& x, const Weight& w, const Epilogue& end) {
  return activated(end.activation, linear(x, dense_weight(w), 1, end.bias ? &*end.bias : nullptr));
}

// On the sparse tensor cores; w in a packed layout.
Tensor sparse_product(const char* op, const Device& device, const Tensor& x, const Weight& w, const Epilogue& end) {
  const bool sm90 = w.layout == Layout24::sm90;
  const int64_t tokens = x.size(0);
  const Tensor rows = with_aligned_rows(x);
  const Tensor bias = end.bias ? as_contiguous(*end.bias) : Tensor();
  const int64_t ld_y = sm90 ? round_up(w.n, 8) : w.n;  // TMA stores rows that start at multiples of 16 bytes
  Tensor y = empty_like_shape(x, {tokens, ld_y});
  const cuda::Linear24Args args = {w.at.values.const_data_ptr(),
                                   w.at.meta.const_data_ptr(),
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

Tensor product(const char* op, const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, Layout24 layout,
               const std::optional<Tensor>& bias, const std::string& activation) {
  const Epilogue end = {bias, activation24_of(op, activation)};
  const int64_t m = columns_of(op, "x", x);
  check_float(op, "x", x);
  const Device device(x);
  const Weight w = check_weight(op, x, values, meta, n, m, layout);
  check_bias24(op, bias, n, x);
  const Tensor x2 = as_tokens(op, "x", x, m);
  const int64_t tokens = x2.size(0);
  // What is packed already is multiplied as it is: to decompress it first costs more than any dense product gains.
  const bool sparse =
      is_half(x) && tokens > 0 && n > 0 && m > 0 && (layout != Layout24::plain || sparse_pays24(tokens, n, m));
  const Tensor y = sparse ? sparse_product(op, device, x2, for_device(op, device, w), end) : dense_product(x2, w, end);
  return with_last(y, x, n);
}

Tensor linear24(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, std::optional<Tensor> bias,
                Text activation) {
  return product("linear24", x, values, meta, n, Layout24::plain, bias, activation);
}

Tensor linear24_packed(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, Text layout,
                       std::optional<Tensor> bias, Text activation) {
  const char* op = "linear24_packed";
  return product(op, x, values, meta, n, layout24_of(op, "layout", layout), bias, activation);
}

// The transposed pack and the dense weight matter in backward only.
Tensor linear24_train(const Tensor& x, const Tensor& values, const Tensor& meta, const Tensor& values_t,
                      const Tensor& meta_t, int64_t n, std::optional<Tensor> bias, Text activation,
                      std::optional<Tensor> weight, Text layout) {
  const char* op = "linear24_train";
  const Layout24 kind = layout24_of(op, "layout", layout);
  check_train24(op, x, values_t, meta_t, n, kind, weight);
  return product(op, x, values, meta, n, kind, bias, activation);
}

// dx = dy W without a transposed pack: a dense product.
Tensor linear24_dx(const Tensor& dy, const Tensor& values, const Tensor& meta, int64_t m) {
  const char* op = "_linear24_dx";
  check_float(op, "dy", dy);
  const int64_t n = columns_of(op, "dy", dy);
  const Device device(dy);
  const Weight w = check_weight(op, dy, values, meta, n, m, Layout24::plain);
  return with_last(linear(as_tokens(op, "dy", dy, n), t2(dense_weight(w)), 1, nullptr), dy, m);
}

// dW of `w`, whose values it is written to: by the kernel that keeps the slots of its own accumulators.
void fused_dw(const char* op, const Device& device, const Tensor& dy, const Tensor& x, const Weight& w) {
  const Tensor dy_rows = with_aligned_rows(dy), x_rows = with_aligned_rows(x);
  const cuda::DwCompress24Args args = {dy_rows.const_data_ptr(),
                                       x_rows.const_data_ptr(),
                                       w.at.meta.const_data_ptr(),
                                       w.at.values.mutable_data_ptr(),
                                       w.n,
                                       w.m,
                                       x.size(0),
                                       row_distance(dy_rows),
                                       row_distance(x_rows),
                                       w.layout};
  check_cuda(op, cuda::launch_dw_compress24_sm80(dtype_of(op, "x", x), args, device.stream(op)));
}

// By the dense library, a panel of rows at a time, of which a kernel keeps the slots.
void panels_dw(const char* op, const Device& device, const Tensor& dy, const Tensor& x, const Weight& w) {
  const Packed24 pack = w.view();
  Tensor panel = empty_like_shape(x, {std::min(kPanelRows, w.n), w.m}), dy_t = t2(dy);
  for (int64_t row = 0; row < pack.rows(); row += kPanelRows) {
    const int64_t rows = std::clamp<int64_t>(w.n - row, 0, kPanelRows);  // of W; the rest is padding
    const Tensor dw = torch::stable::narrow(panel, 0, 0, rows);
    if (rows > 0) addmm_out(dw, dw, torch::stable::narrow(dy_t, 0, row, rows), x, 0, 1);
    check_cuda(op, cuda::launch_gather24(int(x.element_size()), panel.const_data_ptr(), pack,
                                         {row, std::min(pack.rows(), row + kPanelRows)}, device.stream(op)));
  }
}

Tensor dw_compress24(const Tensor& dy, const Tensor& x, const Tensor& meta, Text layout_name) {
  const char* op = "dw_compress24";
  const Layout24 layout = layout24_of(op, "layout", layout_name);
  check_float(op, "x", x);
  const int64_t n = columns_of(op, "dy", dy), m = columns_of(op, "x", x);
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_device(op, "dy", dy, "x", x);
  const Device device(x);
  const Tensor dy2 = as_tokens(op, "dy", dy, n), x2 = as_tokens(op, "x", x, m);
  check(dy2.size(0) == x2.size(0), op, "dy must have x's tokens, got dy ", show(dy), " and x ", show(x));
  const Tensor dvalues = empty_like_shape(x, {padded_rows24(layout, n), padded_columns24(layout, m) / 2});
  const Weight w = check_weight(op, x, dvalues, meta, n, m, layout);
  // The kernel is mma.sync's; on 9.0 the dense library has wgmma, of twice the rate.
  const bool fused = is_half(x) && layout_of_device(op, device) == Layout24::sm80;
  (fused ? fused_dw : panels_dw)(op, device, dy2, x2, w);
  return dvalues;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("linear24", TORCH_BOX(&linear24));
  m.impl("linear24_packed", TORCH_BOX(&linear24_packed));
  m.impl("linear24_train", TORCH_BOX(&linear24_train));
  m.impl("_linear24_dx", TORCH_BOX(&linear24_dx));
  m.impl("dw_compress24", TORCH_BOX(&dw_compress24));
}

}  // namespace slk
#endif
