// quantize_block's and dequantize_block's CUDA kernels against the scalar codecs, bit for bit.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <limits>

#include "optim_numbers.h"
#include "simt/runtime.h"
#include "slkernels/optim_cuda.h"

using namespace slk;

namespace {

int failures = 0;

struct Case {
  DType dtype;
  int block;
  int offset;  // elements by which the buffers are misaligned
  bool stochastic = false;
};

void report(const char* what, Codec codec, const Case& c, int64_t n, int64_t i, double got, double want) {
  if (++failures < 20)
    std::printf("FAIL %s codec %d dtype %d block %d offset %d n %ld: [%ld] = %g, want %g\n", what, int(codec),
                int(c.dtype), c.block, c.offset, long(n), long(i), got, want);
}

int code_at(Codec codec, const uint8_t* codes, int64_t i) {
  return codec::bits(codec) == 8 ? codes[i] : codes[i / 2] >> (i % 2 ? 0 : 4) & 15;
}

template <Codec kCodec>
void check(const std::vector<float>& values, const Case& c) {
  const int64_t n = int64_t(values.size()), blocks = ceil_div(n, c.block);
  const int64_t code_bytes = codec::bits(kCodec) == 8 ? n : ceil_div(n, 2);
  simt::Buffer<uint8_t> x((n + c.offset) * numbers::bytes(c.dtype)), out((n + c.offset) * numbers::bytes(c.dtype));
  simt::Buffer<uint8_t> codes(code_bytes + c.offset);
  simt::Buffer<float> scale(blocks);
  uint8_t* const x_at = x.get() + c.offset * numbers::bytes(c.dtype);
  uint8_t* const out_at = out.get() + c.offset * numbers::bytes(c.dtype);
  for (int64_t i = 0; i < n; ++i) numbers::store(c.dtype, x_at, i, values[i]);

  simt::Buffer<int64_t> random(2);
  random[0] = 0x123456789abcdefLL;
  random[1] = 5;
  const RoundingBits rounding = {uint64_t(random[0]), uint32_t(random[1])};
  if (cuda::launch_quantize({kCodec, c.dtype, x_at, n, c.block, c.stochastic ? random.get() : nullptr,
                             codes.get() + c.offset, scale.get()},
                            nullptr) != cudaSuccess ||
      cuda::launch_dequantize({kCodec, c.dtype, codes.get() + c.offset, scale.get(), n, c.block, out_at}, nullptr) !=
          cudaSuccess)
    report("launch", kCodec, c, n, 0, 0, 0);

  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(n, (b + 1) * c.block);
    uint32_t largest = 0;
    const auto at = [&](int64_t i) {
      const float v = numbers::load(c.dtype, x_at, i);
      return !codec::is_signed(kCodec) && v < 0 ? 0.0f : v;
    };
    for (int64_t i = b * c.block; i < end; ++i) largest = std::max(largest, numbers::bits(at(i)) & 0x7fffffffu);
    const bool usable = largest && largest < 0x7f800000u;
    const float size = usable ? numbers::from_bits(largest) : 1.0f;
    const float want_scale = usable    ? codec::scale_of<kCodec>(size)
                             : largest ? std::numeric_limits<float>::quiet_NaN()
                                       : 0.0f;
    if (!numbers::same(scale[b], want_scale)) report("scale", kCodec, c, n, b, scale[b], want_scale);
    const codec::Block coding = codec::block_of<kCodec>(size);
    for (int64_t i = b * c.block; i < end; ++i) {
      const int code = code_at(kCodec, codes.get() + c.offset, i);
      const int want = !usable        ? codec::zero_code(kCodec)
                       : c.stochastic ? codec::encode_stochastic<kCodec>(at(i), coding, want_scale, rounding(0, i))
                                      : codec::encode<kCodec>(at(i), coding);
      if (code != want) report("code", kCodec, c, n, i, code, want);
      float back = codec::decode<kCodec>(code, scale[b]);
      numbers::store(c.dtype, &back, 0, back);
      const float got = numbers::load(c.dtype, out_at, i);
      if (!numbers::same(got, numbers::load(c.dtype, &back, 0)))
        report("value", kCodec, c, n, i, got, numbers::load(c.dtype, &back, 0));
    }
  }
  if (codec::bits(kCodec) == 4 && n % 2 && (codes[c.offset + n / 2] & 15)) report("last half", kCodec, c, n, n, 0, 0);
}

// Special blocks, all decades, and every size of the last block.
std::vector<float> hard(int64_t n, int block, uint64_t seed) {
  std::vector<float> x = numbers::random(n, seed, 8.0);
  const float powers[] = {1.0f, 3e38f, 1e-37f, 1e-42f, 1e30f, 7e-33f};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / block;
    x[i] *= powers[b % 6];
    if (b % 7 == 6) x[i] = 0;
  }
  if (n > 3 * block) x[2 * block + 1] = std::numeric_limits<float>::quiet_NaN();
  if (n > 4 * block) x[4 * block - 1] = -std::numeric_limits<float>::infinity();
  return x;
}

template <Codec kCodec>
void check_all() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const int block : {16, 48, 128, 256, 272, 1024})
      check<kCodec>(hard(9 * block + (block == 256 ? 5 : block - 1), block, 5), {dtype, block, 0});
  for (const int64_t n : {1, 7, 8, 255, 257}) check<kCodec>(hard(n, 256, uint64_t(n)), {DType::bf16, 256, 1});
  check<kCodec>({}, {DType::f32, 256, 0});
  for (const int block : {48, 256, 272}) check<kCodec>(hard(7 * block + 3, block, 9), {DType::f32, block, 0, true});
}

// Every midpoint of dyn8, and the fp32 numbers around it, in blocks whose scale is `largest`.
template <Codec kCodec>
void check_midpoints(float largest) {
  constexpr bool kSigned = kCodec == Codec::dyn8;
  std::vector<float> x;
  const auto add = [&](float v) {
    if (x.size() % 256 == 0) x.push_back(largest);
    x.push_back(std::min(v * largest, largest));
    if (kSigned) x.push_back(-x.back());
  };
  for (int t = kSigned ? 0 : 1; t < (kSigned ? 128 : 256); ++t) {
    const double middle = (double(codec::dynamic_value<kSigned>(t)) + codec::dynamic_value<kSigned>(t + 1)) / 2;
    const uint32_t around = numbers::bits(float(middle));
    for (int ulps = -3; ulps <= 3; ++ulps) add(numbers::from_bits(around + uint32_t(ulps)));
    add(codec::dynamic_value<kSigned>(t));
  }
  check<kCodec>(x, {DType::f32, 256, 0});
}

}  // namespace

int main() {
  check_all<Codec::dyn8>();
  check_all<Codec::dyn8u>();
  check_all<Codec::lin8>();
  check_all<Codec::lin8u>();
  check_all<Codec::cmp8>();
  check_all<Codec::cmp8u>();
  check_all<Codec::dyn4>();
  check_all<Codec::lin4u>();
  check_all<Codec::fp8>();
  check_all<Codec::fp8u>();
  for (const float largest : {1.0f, 3.7e-5f, 1.9999999f, 1.2e20f, 3e38f, 1.2e-38f, 7e-42f}) {
    check_midpoints<Codec::dyn8>(largest);
    check_midpoints<Codec::dyn8u>(largest);
  }
  std::printf(failures ? "%d failures\n" : "optim_quantize: ok\n", failures);
  return failures ? 1 : 0;
}
