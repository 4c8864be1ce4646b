// grad_norm_sq and clip_coef. Contract: slkernels/optim_norm.h; the same bits as the CPU's, and for any grid.
//
//   sums   a warp a chunk of kNormChunk elements: lane l has the partial sums 2 l and 2 l + 1 (fp32), added up in fp64
//   total  one block, a thread a lane (fp64): kNormLanes chunks a step, then the lanes by halves
#include "cuda/optim_launch.cuh"
#include "slkernels/optim_norm.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksAMultiprocessor = 8;
constexpr int kUnroll = 16;  // loads under way: 2 KB a warp in bf16
static_assert(kNormSums == 2 * kLanes && kNormChunk % (kNormSums * kUnroll) == 0);

constexpr int kNormTable = (kMaxKernelArguments - 256) / 12;

struct NormLaunch {
  DType dtype;
  double* sums;  // [chunks] of this launch
  TensorTable<1, kNormTable> tensors;
};
static_assert(sizeof(NormLaunch) <= kMaxKernelArguments);

struct Pair {
  float low, high;
};
__device__ Pair load_pair(const float* p) {
  const float2 x = *reinterpret_cast<const float2*>(p);
  return {x.x, x.y};
}
__device__ Pair load_pair(const __nv_bfloat16* p) {
  const uint32_t x = *reinterpret_cast<const uint32_t*>(p);
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ Pair load_pair(const __half* p) {
  const float2 x = __half22float2(*reinterpret_cast<const __half2*>(p));
  return {x.x, x.y};
}
__device__ float as_float(float x) {
  return x;
}
__device__ float as_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ float as_float(__half x) {
  return __half2float(x);
}

__device__ void add_square(float x, float& sum) {
  sum = __fmaf_rn(x, x, sum);
}

// The sum of squares of n <= kNormChunk elements, in lane 0.
template <class T>
__device__ double chunk_sum(const T* x, int n) {
  const int at = threadIdx.x % kLanes * 2;
  Pair sums = {0, 0};
  int i = 0;
  if (reinterpret_cast<uintptr_t>(x) % (2 * sizeof(T)) == 0) {
    for (; i + kNormSums * kUnroll <= n; i += kNormSums * kUnroll) {
      Pair loaded[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) loaded[j] = load_pair(x + i + j * kNormSums + at);
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        add_square(loaded[j].low, sums.low);
        add_square(loaded[j].high, sums.high);
      }
    }
  }
  for (; i < n; i += kNormSums) {
    if (i + at < n) add_square(as_float(x[i + at]), sums.low);
    if (i + at + 1 < n) add_square(as_float(x[i + at + 1]), sums.high);
  }
  double low = sums.low, high = sums.high;
  for (int step = kLanes / 2; step > 0; step /= 2) {
    low = __dadd_rn(low, __shfl_down_sync(kAllLanes, low, step));
    high = __dadd_rn(high, __shfl_down_sync(kAllLanes, high, step));
  }
  return __dadd_rn(low, high);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ NormLaunch l) {
  const uint32_t chunks = l.tensors.first[l.tensors.count];
  int i = 0;
  for (uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / kLanes; chunk < chunks; chunk += gridDim.x * kWarps) {
    i = l.tensors.find(i, chunk);
    const uint32_t at = chunk - l.tensors.first[i];
    const bool last = chunk + 1 == l.tensors.first[i + 1];
    const int n = int(kNormChunk) - (last ? l.tensors.missing[i] & kMissingMask : 0);
    const double sum = chunk_sum(global(l.tensors.pointer<const T>(0, i)) + at * kNormChunk, n);
    if (threadIdx.x % kLanes == 0) l.sums[chunk] = sum;
  }
}

__global__ void __launch_bounds__(kNormLanes) total_kernel(const double* sums, int64_t chunks, float* out) {
  __shared__ double lanes[kNormLanes];
  const int lane = threadIdx.x;
  double total = 0;
#pragma unroll 4
  for (int64_t c = lane; c < chunks; c += kNormLanes) total = __dadd_rn(total, sums[c]);
  lanes[lane] = total;
  for (int width = kNormLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    if (lane < width) lanes[lane] = __dadd_rn(lanes[lane], lanes[lane + width]);
  }
  if (lane == 0) *out = float(lanes[0]);
}

__global__ void clip_kernel(const float* norm_sq, float max_norm, float* out) {
  *out = clip_divisor(*norm_sq, max_norm);
}

cudaError_t launch_sums(const NormLaunch& l, int64_t chunks, cudaStream_t stream) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t wanted = ceil_div(chunks, kWarps), fit = int64_t(most) * kBlocksAMultiprocessor;
  const dim3 grid(unsigned(wanted < fit ? wanted : fit));
  switch (l.dtype) {
    case DType::f32:
      return launch(sums_kernel<float>, grid, kThreads, 0, stream, l);
    case DType::bf16:
      return launch(sums_kernel<__nv_bfloat16>, grid, kThreads, 0, stream, l);
    default:
      return launch(sums_kernel<__half>, grid, kThreads, 0, stream, l);
  }
}

}  // namespace

cudaError_t launch_grad_norm_sq(const NormTensor* tensors, int64_t count, double* sums, float* out,
                                cudaStream_t stream) {
  using Builder = TableBuilder<1, kNormTable>;
  const auto builder = std::make_unique<Builder>(kNormChunk);
  const auto launched = std::make_unique<NormLaunch>();
  int64_t done = 0;
  const auto flush = [&]() -> cudaError_t {
    if (builder->count() == 0) return cudaSuccess;
    launched->sums = sums + done;
    builder->write(launched->tensors);
    done += builder->tiles();
    const cudaError_t error = launch_sums(*launched, builder->tiles(), stream);
    builder->clear();
    return error;
  };
  // A launch takes neighbours of one dtype, since chunks are added in the order of the list.
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].n == 0) continue;
    const Builder::Entry entry = {{address_of(tensors[i].data)}, tensors[i].n, 0, 0};
    const bool fits = builder->count() == 0 || launched->dtype == tensors[i].dtype;
    if (fits && builder->add(entry)) {
      launched->dtype = tensors[i].dtype;
      continue;
    }
    if (const cudaError_t error = flush(); error != cudaSuccess) return error;
    launched->dtype = tensors[i].dtype;
    if (!builder->add(entry)) return cudaErrorInvalidValue;
  }
  if (const cudaError_t error = flush(); error != cudaSuccess) return error;
  return launch(total_kernel, 1, kNormLanes, 0, stream, sums, done, out);
}

cudaError_t launch_clip_coef(const float* norm_sq, float max_norm, float* out, cudaStream_t stream) {
  return launch(clip_kernel, 1, 1, 0, stream, norm_sq, max_norm, out);
}

}  // namespace slk::cuda
