// quantize_block and dequantize_block. Contract: slkernels/optim.h.
#include "cpu/optim_block.h"
#include "cpu/optim_step.h"
#include "cpu/types.h"
#include "slkernels/philox.cuh"

namespace slk::cpu::SLK_ISA {
namespace {

template <Codec kCodec, class T>
void quantize_nearest(const T* x, int64_t n, int64_t block, Range blocks, uint8_t* codes, float* scale) {
  alignas(64) float buffer[kMaxQuantBlock];
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block;
    const int size = int(n - start < block ? n - start : block);
    VU largest = {};
    for_pairs(size, [&](int i, auto whole) {
      const Pair p = load_pair(x + start, i, size, whole);
      const auto take = [&](V v, float* to) {
        if (!codec::is_signed(kCodec)) v = v < zero() ? zero() : v;
        if (kCodec == Codec::cmp8u) v = sqrt(v);
        store(to, v);
        largest = max(largest, (VU)abs(v));
      };
      take(p.even, buffer + i);
      take(p.odd, buffer + i + kLanes);
    });
    BlockScale scales[kLanes];
    block_scales<kCodec>(VU{} + max_lane(largest), scales);
    encode_block<kCodec>(buffer, size, scales[0], codes + code_bytes(kCodec, start), scale + b);
  }
}

// Element by element, with the definition itself.
template <Codec kCodec, class T>
void quantize_stochastic(const T* x, int64_t n, int64_t block, Range blocks, const RoundingBits& random, uint8_t* codes,
                         float* scale) {
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block, stop = n - start < block ? n : start + block;
    const auto value = [&](int64_t i) {
      const float v = to_float(x[i]);
      return !codec::is_signed(kCodec) && v < 0 ? 0.0f : v;
    };
    uint32_t largest_bits = 0;
    for (int64_t i = start; i < stop; ++i) {
      const uint32_t u = to_bits(value(i)) & 0x7fffffffu;
      largest_bits = largest_bits > u ? largest_bits : u;
    }
    const bool known = largest_bits != 0 && largest_bits < kInfinityBits;
    const float largest = from_bits(largest_bits);
    const codec::Block about = codec::block_of<kCodec>(known ? largest : 1.0f);
    scale[b] = known ? codec::scale_of<kCodec>(largest) : largest_bits == 0 ? 0.0f : __builtin_nanf("");
    Philox bits = {};
    for (int64_t i = start; i < stop; ++i) {
      const int half = int(i % RoundingBits::kElements);
      if (half == 0 || i == start) bits = random.draw(0, i / RoundingBits::kElements);
      const uint32_t draw = bits.word[half / 2] >> (half % 2 * 16) & 0xffffu;
      const int code =
          known ? codec::encode_stochastic<kCodec>(value(i), about, scale[b], draw) : codec::zero_code(kCodec);
      if (codec::bits(kCodec) == 8)
        codes[i] = uint8_t(code);
      else
        codes[i / 2] = i % 2 ? uint8_t(codes[i / 2] | code) : uint8_t(code << 4);
    }
  }
}

template <Codec kCodec, class T>
void dequantize_t(const uint8_t* codes, const float* scale, int64_t n, int64_t block, Range blocks, T* out) {
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int64_t start = b * block;
    const int size = int(n - start < block ? n - start : block);
    const Decoder<kCodec> decode(scale[b]);
    for_pairs(size, [&](int i, auto whole) {
      const PairI code = load_codes<kCodec>(codes + code_bytes(kCodec, start), i, size, whole);
      store_pair(out + start, Pair{decode(code.even), decode(code.odd)}, i, size, whole);
    });
  }
}

template <Codec kCodec>
using CodecConstant = std::integral_constant<Codec, kCodec>;
template <class F>
void with_codec(Codec codec, F f) {
  switch (codec) {
    case Codec::dyn8:
      return f(CodecConstant<Codec::dyn8>());
    case Codec::dyn8u:
      return f(CodecConstant<Codec::dyn8u>());
    case Codec::lin8:
      return f(CodecConstant<Codec::lin8>());
    case Codec::lin8u:
      return f(CodecConstant<Codec::lin8u>());
    case Codec::cmp8:
      return f(CodecConstant<Codec::cmp8>());
    case Codec::cmp8u:
      return f(CodecConstant<Codec::cmp8u>());
    case Codec::dyn4:
      return f(CodecConstant<Codec::dyn4>());
    case Codec::lin4u:
      return f(CodecConstant<Codec::lin4u>());
    case Codec::fp8:
      return f(CodecConstant<Codec::fp8>());
    case Codec::fp8u:
      return f(CodecConstant<Codec::fp8u>());
  }
}

void quantize(Codec codec, DType dtype, const void* x, int64_t n, int64_t block, Range blocks, const RandomKey* random,
              uint8_t* codes, float* scale) {
  with_codec(codec, [&](auto which) {
    constexpr Codec kCodec = decltype(which)::value;
    with_float_type(dtype, [&](auto* type) {
      auto* p = static_cast<const Element<decltype(type)>*>(x);
      if (random)
        quantize_stochastic<kCodec>(p, n, block, blocks, {random->seed, random->step}, codes, scale);
      else
        quantize_nearest<kCodec>(p, n, block, blocks, codes, scale);
    });
  });
}

void dequantize(Codec codec, DType dtype, const uint8_t* codes, const float* scale, int64_t n, int64_t block,
                Range blocks, void* out) {
  with_codec(codec, [&](auto which) {
    with_float_type(dtype, [&](auto* type) {
      dequantize_t<decltype(which)::value>(codes, scale, n, block, blocks, static_cast<Element<decltype(type)>*>(out));
    });
  });
}

}  // namespace

extern const OptimKernels optim_table;
const OptimKernels optim_table = {quantize, dequantize, step_adam, step_ademamix, step_momentum};

}  // namespace slk::cpu::SLK_ISA
