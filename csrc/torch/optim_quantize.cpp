// quantize_block and dequantize_block at the torch boundary.
#include "torch/optim_cuda.h"

namespace slk::optim {
namespace {

std::tuple<Tensor, Tensor> quantize_block(const Tensor& x, Text codec_name, int64_t block, int64_t round_mode,
                                          std::optional<Tensor> rng) {
  constexpr const char* op = "quantize_block";
  const Codec codec = codec_of(op, codec_name, false);
  check_block(op, block);
  const DType dtype = float_type_of(op, "x", x);
  check_rounding(op, round_mode, rng);
  const Tensor in = as_contiguous(x);
  const int64_t n = in.numel(), blocks = ceil_div(n, block);
  const Shape code_shape = codec::bits(codec) == 4 ? Shape{code_count(codec, n)} : shape_of(in);
  Tensor codes = empty_like_shape(in, code_shape, ScalarType::Byte);
  Tensor scale = empty_like_shape(in, {blocks}, ScalarType::Float);
  if (on_cuda(in)) {
    quantize_cuda(op, codec, dtype, in, block, round_mode, rng, codes, scale);
    return {codes, scale};
  }
  const void* from = in.const_data_ptr();
  uint8_t* code_data = codes.mutable_data_ptr<uint8_t>();
  float* scale_data = scale.mutable_data_ptr<float>();
  const cpu::RandomKey key = round_mode == 1 ? random_key(rng) : cpu::RandomKey{};
  parallel_for(blocks, grain_blocks(block), [&](int64_t b, int64_t e) {
    cpu::optim_kernels().quantize(codec, dtype, from, n, block, {b, e}, round_mode == 1 ? &key : nullptr, code_data,
                                  scale_data);
  });
  return {codes, scale};
}

Tensor dequantize_block(const Tensor& codes, const Tensor& scale, Text codec_name, int64_t block,
                        std::optional<ScalarType> out_type, std::optional<int64_t> numel) {
  constexpr const char* op = "dequantize_block";
  const Codec codec = codec_of(op, codec_name, false);
  check_block(op, block);
  check(codes.scalar_type() == ScalarType::Byte, op, "codes must be uint8, got ", show(codes.scalar_type()));
  check(scale.scalar_type() == ScalarType::Float, op, "scale must be float32, got ", show(scale.scalar_type()));
  const bool packed = codec::bits(codec) == 4;
  const int64_t n = numel.value_or(packed ? 2 * codes.numel() : codes.numel()), blocks = ceil_div(n, block);
  if (packed)
    check(n >= 0 && code_count(codec, n) == codes.numel(), op, "numel must be ", 2 * codes.numel(),
          " or one less, got ", n);
  else
    check(n == codes.numel(), op, "numel must be the number of codes, ", codes.numel(), ", got ", n);
  check(scale.dim() == 1 && scale.size(0) == blocks, op, "scale must be [", blocks, "], got ", show(scale));
  check_same_device(op, "scale", scale, "codes", codes);
  const Tensor code_in = as_contiguous(codes), scale_in = as_contiguous(scale);
  Tensor out = empty_like_shape(code_in, packed ? Shape{n} : shape_of(code_in), out_type.value_or(ScalarType::Float));
  const DType dtype = float_type_of(op, "dtype", out);
  if (on_cuda(out)) {
    dequantize_cuda(op, codec, dtype, code_in, scale_in, block, out);
    return out;
  }
  const uint8_t* code_data = code_in.const_data_ptr<uint8_t>();
  const float* scale_data = scale_in.const_data_ptr<float>();
  void* to = out.mutable_data_ptr();
  parallel_for(blocks, grain_blocks(block), [&](int64_t b, int64_t e) {
    cpu::optim_kernels().dequantize(codec, dtype, code_data, scale_data, n, block, {b, e}, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("quantize_block", TORCH_BOX(&quantize_block));
  m.impl("dequantize_block", TORCH_BOX(&dequantize_block));
}

#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("quantize_block", TORCH_BOX(&quantize_block));
  m.impl("dequantize_block", TORCH_BOX(&dequantize_block));
}
#endif

}  // namespace slk::optim
