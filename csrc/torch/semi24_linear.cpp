// Products of family `semi24` on a CPU: checks, allocation, threads.
#include "slkernels/semi24_linear.h"

#include <algorithm>

#include "torch/semi24_linear.h"
#include "torch/support.h"

namespace slk {

Activation24 activation24_of(const char* op, const std::string& name) {
  if (name == "none") return Activation24::none;
  if (name == "relu") return Activation24::relu;
  if (name == "silu") return Activation24::silu;
  if (name == "gelu") return Activation24::gelu;
  check(name == "relu2", op, "activation must be none, relu, silu, gelu or relu2, got ", name);
  return Activation24::relu2;
}

PackedTensors24 check_weight24(const char* op, const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                               Layout24 layout, const Tensor& x) {
  const PackedTensors24 w = check_packed24(op, values, meta, n, m, layout);
  check_same_dtype(op, "values", values, "x", x);
  check_same_device(op, "values", values, "x", x);
  return w;
}

void check_bias24(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& x) {
  if (!bias) return;
  check(bias->dim() == 1 && bias->size(0) == n, op, "bias must be [", n, "], got ", show(*bias));
  check_same_dtype(op, "bias", *bias, "x", x);
  check_same_device(op, "bias", *bias, "x", x);
}

int64_t columns_of(const char* op, const char* name, const Tensor& x) {
  check(x.dim() >= 1, op, name, " must have at least one dimension, got ", show(x));
  return x.size(x.dim() - 1);
}

Tensor with_last(const Tensor& y, const Tensor& like, int64_t last) {
  Shape shape = shape_of(like);
  shape.back() = last;
  return torch::stable::view(y, {shape.data(), shape.size()});
}

void check_train24(const char* op, const Tensor& x, const Tensor& values_t, const Tensor& meta_t, int64_t n,
                   Layout24 layout, const std::optional<Tensor>& weight) {
  const int64_t m = columns_of(op, "x", x);
  const int64_t rows = padded_rows24(layout, m), kept = padded_columns24(layout, n) / 2;
  check(values_t.dim() == 2 && values_t.size(0) == rows && values_t.size(1) == kept, op, "values_t must be [", rows,
        ", ", kept, "], got ", show(values_t));
  check_same_dtype(op, "values_t", values_t, "x", x);
  check_same_device(op, "values_t", values_t, "x", x);
  check_meta24(op, "meta_t", meta_t, m, n, layout);
  check_same_device(op, "meta_t", meta_t, "x", x);
  if (weight)
    check(weight->dim() == 2 && weight->size(0) == n && weight->size(1) == m, op, "weight must be [", n, ", ", m,
          "], got ", show(*weight));
}

namespace {

// Columns of W whose lists grad_x makes at a time: 2.5 bytes an element of the slice.
constexpr int64_t kSlice = 1024;

Weight24 weight_of(const PackedTensors24& w, int64_t n, int64_t m) {
  return {w.values.const_data_ptr(), w.meta.const_data_ptr<uint8_t>(), n, m};
}

// f(rows, tokens) for tiles that cover both: smaller ones in rows when there would not be enough for every thread.
template <class F>
void for_tiles(int64_t rows, int64_t tokens, int64_t tile_rows, int64_t tile_tokens, const F& f) {
  const int64_t panels = ceil_div(tokens, tile_tokens), wanted = 4 * torch::stable::get_num_threads();
  while (tile_rows > 64 && panels * ceil_div(rows, tile_rows) < wanted) tile_rows /= 2;
  const int64_t blocks = ceil_div(rows, tile_rows);
  parallel_for(panels * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % blocks * tile_rows, token = i / blocks * tile_tokens;
      f(Range{row, std::min(rows, row + tile_rows)}, Range{token, std::min(tokens, token + tile_tokens)});
    }
  });
}

// x in fp32, rows padded with zeros for the kernels that take few tokens.
Tensor padded_f32(const Tensor& x) {
  const int64_t m = x.size(1);
  Tensor out = empty_like_shape(x, {x.size(0), round_up(m, cpu::kFewTokensPad)}, ScalarType::Float);
  torch::stable::zero_(out);
  Tensor inner = torch::stable::narrow(out, 1, 0, m);
  torch::stable::copy_(inner, x);
  return out;
}

Tensor linear24_plain(const char* op, const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n,
                      const std::optional<Tensor>& bias, const std::string& activation) {
  const Activation24 f = activation24_of(op, activation);
  const DType dtype = dtype_of(op, "x", x);
  const int64_t m = columns_of(op, "x", x);
  const PackedTensors24 pack = check_weight24(op, values, meta, n, m, Layout24::plain, x);
  check_bias24(op, bias, n, x);
  const Tensor x2 = as_tokens(op, "x", x, m);
  const Tensor offset = bias ? as_contiguous(*bias) : Tensor();
  const void* b = bias ? offset.const_data_ptr() : nullptr;
  const Weight24 w = weight_of(pack, n, m);
  const int64_t tokens = x2.size(0);
  const Tensor y = empty_like_shape(x, {tokens, n});
  const Matrix ym = as_matrix(y);
  const auto& kernels = cpu::semi24_linear_kernels();
  if (dtype == DType::f64) {
    parallel_for(tokens, 1, [&](int64_t begin, int64_t end) {
      cpu::linear24_f64(w, as_matrix(x2), static_cast<const double*>(b), f, {begin, end}, ym);
    });
  } else if (tokens > 0 && tokens <= cpu::kFewTokens24) {
    const Tensor padded = padded_f32(x2);
    const int64_t grain = std::max<int64_t>(16, (1 << 18) / (std::max<int64_t>(m, 1) * tokens));
    parallel_for(n, grain, [&](int64_t begin, int64_t end) {
      kernels.linear_few(dtype, w, as_matrix(padded), b, f, {begin, end}, ym);
    });
  } else {
    for_tiles(n, tokens, cpu::kPanelRows24, cpu::kPanelTokens24, [&](Range rows, Range panel) {
      kernels.linear(dtype, w, as_matrix(x2), b, f, rows, panel, ym, thread_scratch(cpu::kPanelScratch24));
    });
  }
  return with_last(y, x, n);
}

Tensor linear24(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, std::optional<Tensor> bias,
                Text activation) {
  return linear24_plain("linear24", x, values, meta, n, bias, activation);
}

// dx = dy W without a transposed pack.
Tensor linear24_dx(const Tensor& dy, const Tensor& values, const Tensor& meta, int64_t m) {
  const char* op = "_linear24_dx";
  const DType dtype = dtype_of(op, "dy", dy);
  const int64_t n = columns_of(op, "dy", dy);
  const PackedTensors24 pack = check_weight24(op, values, meta, n, m, Layout24::plain, dy);
  const Tensor dy2 = as_tokens(op, "dy", dy, n);
  const Weight24 w = weight_of(pack, n, m);
  const int64_t tokens = dy2.size(0);
  const Tensor dx = empty_like_shape(dy, {tokens, m});
  const Matrix dym = as_matrix(dy2), dxm = as_matrix(dx);
  if (dtype == DType::f64) {
    parallel_for(tokens, 1, [&](int64_t begin, int64_t end) { cpu::grad_x24_f64(w, dym, {begin, end}, dxm); });
    return with_last(dx, dy, m);
  }
  const auto& kernels = cpu::semi24_linear_kernels();
  const int64_t blocks = ceil_div(n, cpu::kDepth24), widest = std::min(kSlice, m);
  const int64_t entries = blocks * cpu::kDepth24 * kept24(widest);
  const Tensor list_values = empty_like_shape(dy, {entries}, ScalarType::Float);
  const Tensor list_rows = empty_like_shape(dy, {entries}, ScalarType::Byte);
  const Tensor list_start = empty_like_shape(dy, {blocks * (widest + 1)}, ScalarType::Int);
  for (int64_t j = 0; tokens > 0 && j < m; j += kSlice) {
    const int64_t width = std::min(kSlice, m - j);
    const cpu::ColumnLists24 lists = {list_values.mutable_data_ptr<float>(),
                                      list_rows.mutable_data_ptr<uint8_t>(),
                                      list_start.mutable_data_ptr<int32_t>(),
                                      {j, j + width}};
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { kernels.column_lists(dtype, w, {begin, end}, lists); });
    for_tiles(width, tokens, cpu::kPanelRows24, cpu::kPanelTokens24, [&](Range columns, Range panel) {
      kernels.grad_x(dtype, lists, dym, {j + columns.begin, j + columns.end}, panel, dxm,
                     thread_scratch(cpu::kPanelScratch24));
    });
  }
  return with_last(dx, dy, m);
}

Tensor grad_w_plain(const char* op, const Tensor& dy, const Tensor& x, const Tensor& meta) {
  const DType dtype = dtype_of(op, "x", x);
  const int64_t n = columns_of(op, "dy", dy), m = columns_of(op, "x", x);
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_device(op, "dy", dy, "x", x);
  check_same_device(op, "meta", meta, "x", x);
  const Tensor codes = check_meta24(op, "meta", meta, n, m, Layout24::plain);
  const Tensor dy2 = as_tokens(op, "dy", dy, n), x2 = as_tokens(op, "x", x, m);
  check(dy2.size(0) == x2.size(0), op, "dy must have x's tokens, got dy ", show(dy), " and x ", show(x));
  const Tensor dvalues = empty_like_shape(x, {n, kept24(m)});
  const Weight24 w = {nullptr, codes.const_data_ptr<uint8_t>(), n, m};
  const Matrix dym = as_matrix(dy2), xm = as_matrix(x2);
  if (dtype == DType::f64) {
    double* out = dvalues.mutable_data_ptr<double>();
    parallel_for(n, 1, [&](int64_t begin, int64_t end) { cpu::grad_w24_f64(w, dym, xm, {begin, end}, out); });
    return dvalues;
  }
  for_tiles(n, m, cpu::kGradRows24, cpu::kGradColumns24, [&](Range rows, Range columns) {
    cpu::semi24_linear_kernels().grad_w(dtype, w, dym, xm, rows, columns, dvalues.mutable_data_ptr(),
                                        thread_scratch(cpu::kGradScratch24));
  });
  return dvalues;
}

// ---- the packed layouts: converted to plain and back --------------------------------------------------------------

std::tuple<Tensor, Tensor> convert24(const Tensor& values, const Tensor& meta, int64_t n, int64_t m,
                                     const std::string& source, const std::string& target) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(values), from(meta), from(n), from(m), from(source), from(target)};
  last_error().clear();
  const auto error = torch_call_dispatcher("slkernels::convert24", "", stack.data(), TORCH_ABI_VERSION);
  if (error != TORCH_SUCCESS && !last_error().empty()) throw std::runtime_error(last_error());
  TORCH_ERROR_CODE_CHECK(error);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor linear24_any(const char* op, const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n,
                    const std::string& layout, const std::optional<Tensor>& bias, const std::string& activation) {
  const Layout24 kind = layout24_of(op, "layout", layout);
  if (kind == Layout24::plain) return linear24_plain(op, x, values, meta, n, bias, activation);
  const int64_t m = columns_of(op, "x", x);
  check_weight24(op, values, meta, n, m, kind, x);
  const auto [v, codes] = convert24(values, meta, n, m, layout, "plain");
  return linear24_plain(op, x, v, codes, n, bias, activation);
}

Tensor linear24_packed(const Tensor& x, const Tensor& values, const Tensor& meta, int64_t n, Text layout,
                       std::optional<Tensor> bias, Text activation) {
  return linear24_any("linear24_packed", x, values, meta, n, layout, bias, activation);
}

// The transposed pack and the dense weight matter in backward only.
Tensor linear24_train(const Tensor& x, const Tensor& values, const Tensor& meta, const Tensor& values_t,
                      const Tensor& meta_t, int64_t n, std::optional<Tensor> bias, Text activation,
                      std::optional<Tensor> weight, Text layout) {
  const char* op = "linear24_train";
  check_train24(op, x, values_t, meta_t, n, layout24_of(op, "layout", layout), weight);
  return linear24_any(op, x, values, meta, n, layout, bias, activation);
}

Tensor dw_compress24(const Tensor& dy, const Tensor& x, const Tensor& meta, Text layout) {
  const char* op = "dw_compress24";
  const Layout24 kind = layout24_of(op, "layout", layout);
  if (kind == Layout24::plain) return grad_w_plain(op, dy, x, meta);
  const int64_t n = columns_of(op, "dy", dy), m = columns_of(op, "x", x);
  Tensor unused = empty_like_shape(x, {padded_rows24(kind, n), padded_columns24(kind, m) / 2});
  torch::stable::zero_(unused);
  const Tensor codes = std::get<1>(convert24(unused, meta, n, m, layout, "plain"));
  return std::get<0>(convert24(grad_w_plain(op, dy, x, codes), codes, n, m, "plain", layout));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("linear24", TORCH_BOX(&linear24));
  m.impl("_linear24_dx", TORCH_BOX(&linear24_dx));
  m.impl("dw_compress24", TORCH_BOX(&dw_compress24));
  m.impl("linear24_packed", TORCH_BOX(&linear24_packed));
  m.impl("linear24_train", TORCH_BOX(&linear24_train));
}

}  // namespace slk
