// quantize_block and dequantize_block. A warp holds a block (or several small ones), eight elements a lane; blocks of
// more than 256 elements are read twice, for their scale and for their codes. Contract: slkernels/optim.h.
#include "cuda/optim_tile.cuh"
#include "slkernels/optim_cuda.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksAMultiprocessor = 2;  // what the 64 KB decoding table leaves room for on sm_80

template <class F>
__device__ void with_element_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((__nv_bfloat16*)nullptr);
    default:
      return f((__half*)nullptr);
  }
}

// What unsigned codecs see of x: negative numbers count as 0, NaN stays.
template <Codec kCodec>
__device__ float seen(float x) {
  return !codec::is_signed(kCodec) && x < 0 ? 0.0f : x;
}

template <Codec kCodec>
__device__ void load_values(const QuantizeArgs& a, const Part& part, float (&x)[kLaneElements]) {
  with_element_type(a.dtype, [&](auto* type) {
    const auto* p = static_cast<const std::remove_pointer_t<decltype(type)>*>(a.x) + part.first;
    const auto raw = load8(p, part.count, part.count == kLaneElements && can_move_whole(p));
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) x[i] = seen<kCodec>(element(raw, i));
  });
}

// The codes of eight elements, rounded stochastically. One element at a time, the first of `x`, which then moves up:
// the search of the scalar codec is too long to have eight of it.
template <Codec kCodec>
__device__ Codes<kCodec> encode_stochastic(const int64_t* random, int64_t first, uint32_t largest,
                                           float (&x)[kLaneElements]) {
  if (largest == 0 || largest >= kInfinityBits) return codes_of_zero<kCodec>();
  const codec::Block block = codec::block_of<kCodec>(__uint_as_float(largest));
  const float scale = codec::scale_of<kCodec>(__uint_as_float(largest));
  const RoundingBits source = {uint64_t(random[0]), uint32_t(random[1])};
  Philox bits = source.draw(0, first / kLaneElements);
  constexpr int kBits = codec::bits(kCodec);
  uint64_t packed = 0;
#pragma unroll 1
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t draw = bits.word[0] >> i % 2 * 16 & 0xffffu;
    const auto code = uint64_t(codec::encode_stochastic<kCodec>(x[0], block, scale, draw));
    packed |= code << (kBits == 8 ? 8 * i : (i ^ 1) * 4);  // of two halves the high one comes first
#pragma unroll
    for (int j = 0; j + 1 < kLaneElements; ++j) x[j] = x[j + 1];
    if (i % 2)
#pragma unroll
      for (int j = 0; j < 3; ++j) bits.word[j] = bits.word[j + 1];
  }
  if constexpr (kBits == 8) {
    return {uint32_t(packed), uint32_t(packed >> 32)};
  } else {
    return uint32_t(packed);
  }
}

template <Codec kCodec>
__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor) quantize_kernel(QuantizeArgs a) {
  uint32_t* table = dynamic_shared<uint32_t>();  // [kEncodeWords]
  fill_encode<kCodec>(table);
  __syncthreads();
  const Lanes lanes(a.block);
  const int64_t blocks = ceil_div(a.n, a.block), warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  for (int64_t b = warp * lanes.blocks; b < blocks; b += int64_t(gridDim.x) * kWarps * lanes.blocks) {
    const int64_t start = (b + lanes.group) * a.block, end = lanes.idle() ? start : start + a.block;
    float x[kLaneElements];
    uint32_t largest = 0;  // as bits, which puts NaN above infinity
    for (int chunk = 0; chunk < a.block; chunk += kChunkElements) {
      load_values<kCodec>(a, part_of(a.n, start + chunk + lanes.at * kLaneElements, end), x);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
    }
    largest = lanes.max(largest);
    const BlockCoding<kCodec> coding(largest);
    if (lanes.at == 0 && !lanes.idle() && start < a.n) a.scale[b + lanes.group] = coding.scale();
    for (int chunk = 0; chunk < a.block; chunk += kChunkElements) {
      const Part part = part_of(a.n, start + chunk + lanes.at * kLaneElements, end);
      if (a.block > kChunkElements) load_values<kCodec>(a, part, x);
      const Codes<kCodec> codes =
          a.random ? encode_stochastic<kCodec>(a.random, part.first, largest, x) : coding.encode(table, x);
      store_codes<kCodec>(a.codes, part.first, part.count,
                          part.count == kLaneElements && can_move_codes<kCodec>(a.codes), codes);
    }
  }
}

template <Codec kCodec>
__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor) dequantize_kernel(DequantizeArgs a) {
  float* table = dynamic_shared<float>();  // [kDecodeWords]; one half of it
  fill_decode<kCodec>(table, 0);
  __syncthreads();
  const uint32_t lane_bytes = threadIdx.x % kLanes * 4;
  for (int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kLaneElements; first < a.n;
       first += int64_t(gridDim.x) * kThreads * kLaneElements) {
    const Part part = part_of(a.n, first, a.n);
    const bool whole = part.count == kLaneElements;
    const auto codes = load_codes<kCodec>(a.codes, first, part.count, whole && can_move_codes<kCodec>(a.codes));
    const float scale = a.scale[first / a.block];
    float x[kLaneElements];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) x[i] = decode_one<kCodec>(table, codes, i, lane_bytes, scale);
    with_element_type(a.dtype, [&](auto* type) {
      auto* p = static_cast<std::remove_pointer_t<decltype(type)>*>(a.out) + first;
      store8(p, rounded<std::remove_pointer_t<decltype(type)>>(x), part.count, whole && can_move_whole(p));
    });
  }
}

// As many blocks of threads as the device runs at once, or as the work fills.
cudaError_t grid_for(int64_t warps, dim3& grid) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = int64_t(multiprocessors) * kBlocksAMultiprocessor, wanted = ceil_div(warps, kWarps);
  grid = dim3(unsigned(wanted < most ? wanted : most));
  return error;
}

template <class Args>
cudaError_t launch_with(void (*kernel)(Args), const Args& args, int64_t warps, size_t shared_bytes,
                        cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  dim3 grid;
  if (const cudaError_t error = grid_for(warps, grid); error != cudaSuccess) return error;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  return error != cudaSuccess ? error : launch(kernel, grid, kThreads, shared_bytes, stream, args);
}

template <Codec kCodec>
using CodecTag = std::integral_constant<Codec, kCodec>;

template <class F>
cudaError_t with_codec(Codec codec, F f) {
  switch (codec) {
    case Codec::dyn8:
      return f(CodecTag<Codec::dyn8>());
    case Codec::dyn8u:
      return f(CodecTag<Codec::dyn8u>());
    case Codec::lin8:
      return f(CodecTag<Codec::lin8>());
    case Codec::lin8u:
      return f(CodecTag<Codec::lin8u>());
    case Codec::cmp8:
      return f(CodecTag<Codec::cmp8>());
    case Codec::cmp8u:
      return f(CodecTag<Codec::cmp8u>());
    case Codec::dyn4:
      return f(CodecTag<Codec::dyn4>());
    case Codec::lin4u:
      return f(CodecTag<Codec::lin4u>());
    case Codec::fp8:
      return f(CodecTag<Codec::fp8>());
    case Codec::fp8u:
      return f(CodecTag<Codec::fp8u>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  return with_codec(args.codec, [&](auto tag) {
    constexpr Codec kCodec = decltype(tag)::value;
    const int64_t blocks_a_warp = args.block < kChunkElements ? kChunkElements / args.block : 1;
    return launch_with(quantize_kernel<kCodec>, args, ceil_div(ceil_div(args.n, args.block), blocks_a_warp),
                       kEncodeWords<kCodec> * sizeof(uint32_t), stream);
  });
}

cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  return with_codec(args.codec, [&](auto tag) {
    constexpr Codec kCodec = decltype(tag)::value;
    return launch_with(dequantize_kernel<kCodec>, args, ceil_div(args.n, kChunkElements),
                       kDecodeWords<kCodec> * sizeof(float), stream);
  });
}

}  // namespace slk::cuda
