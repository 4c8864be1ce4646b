// Quantized weights of family `project`. Contract: slkernels/project_quant.h.
//
// Quantizing takes a warp a group, eight elements a lane and turn. It goes over the group twice, for its range and for
// its codes; the second time comes from L1, which costs less than the registers of a group of any size. The linear
// kernel takes a warp a row of W: 16 codes a lane, read once, for all tokens.
#include "cuda/project_vectors.cuh"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kMaxBlocks = 8192;
constexpr int kBlocksPerSm = 2;  // lets the compiler take the 128 registers that eight divisions at a time ask for

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  return unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline float decoded(int code, int zero, float scale) {
  return codec::multiply(float(code - zero), scale);
}

// ---- quantize -------------------------------------------------------------------------------------------------------

// Elements of a float weight.
template <class T>
struct FloatSource {
  const T* w;
  int64_t m;
  __device__ void begin(int64_t, int64_t) {}
  __device__ void load(int64_t row, int64_t column, int count, float (&x)[kEight]) const {
    load_floats(w + row * m + column, count, x);
  }
};

// Elements of a quantized weight after an update.
template <class TT>
struct UpdateSource {
  GroupCodes q;
  UpdateOperands operands;
  UpdateScalars scalars;
  float scale;
  int zero;
  __device__ void begin(int64_t row, int64_t g) {
    scale = q.scale[row * q.groups() + g];
    zero = q.zero[row * q.groups() + g];
  }
  __device__ void load(int64_t row, int64_t column, int count, float (&x)[kEight]) const {
    const Eight<uint8_t> codes = load8(q.codes + row * q.m + column, count, uint8_t(0));
#pragma unroll
    for (int k = 0; k < kEight; ++k)
      x[k] = k < count ? codec::multiply(decoded(codes.at[k], zero, scale), scalars.decay) : 0.0f;
    add_terms<TT, TT>(operands, scalars.step, row, column, count, x);
  }
};

// The largest float of the warp's, in every lane.
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

template <class Source>
__device__ inline void quantize_one(Source& source, const GroupCodes& q, int64_t row, int64_t g,
                                    const DeviceRounding& rounding) {
  const int lane = threadIdx.x % 32;
  const int64_t first = g * q.group, end = first + q.group < q.m ? first + q.group : q.m;
  source.begin(row, g);
  float hi = 0, lo = 0;
  int broken = 0;
  for (int64_t column = first + lane * kEight; column < end; column += 32 * kEight) {
    float x[kEight];
    source.load(row, column, end - column < kEight ? int(end - column) : kEight, x);
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      hi = fmaxf(hi, x[k]);
      lo = fminf(lo, x[k]);
      broken |= !(codec::magnitude(x[k]) < INFINITY);
    }
  }
  hi = warp_max(hi);
  lo = -warp_max(-lo);
  const float top = float((1 << q.bits) - 1), scale = codec::divide(codec::subtract(hi, lo), top);
  const bool finite = !__any_sync(0xffffffffu, broken) && scale < INFINITY;
  const bool empty = !finite || scale == 0;
  const int zero = empty ? 0 : codec::round_even(fminf(codec::divide(-lo, scale), top));
  for (int64_t column = first + lane * kEight; column < end; column += 32 * kEight) {
    const int count = end - column < kEight ? int(end - column) : kEight;
    float x[kEight];
    source.load(row, column, count, x);
    uint32_t random[kEight] = {};
    if (rounding.on()) random8(rounding.bits(), row * q.m + column, random);
    Eight<uint8_t> codes;
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      int code = 0;
      if (!empty && k < count) {
        const float y = codec::divide(x[k], scale);
        if (rounding.on()) {
          const float down = floorf(y);
          code = int(down) + (codec::subtract(y, down) > float(random[k]) * 0x1p-16f ? 1 : 0);
        } else {
          code = codec::round_even(y);
        }
        code = min(max(code + zero, 0), (1 << q.bits) - 1);
      }
      codes.at[k] = uint8_t(code);
    }
    if (q.bits == 8) {
      store8(q.codes + row * q.m + column, codes, count);
    } else {
      uint8_t* packed = q.codes + row * q.row_bytes() + column / 2;
#pragma unroll
      for (int k = 0; k < kEight / 2; ++k)
        if (2 * k < count) packed[k] = uint8_t(codes.at[2 * k] << 4 | codes.at[2 * k + 1]);
    }
  }
  if (lane == 0) {
    q.scale[row * q.groups() + g] = finite ? scale : NAN;
    q.zero[row * q.groups() + g] = uint8_t(zero);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    quantize_group_kernel(const T* w, GroupCodes q, int64_t rows, DeviceRounding rounding) {
  const int64_t groups = q.groups(), total = rows * groups;
  FloatSource<T> source = {w, q.m};
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < total; i += int64_t(gridDim.x) * kWarps)
    quantize_one(source, q, i / groups, i % groups, rounding);
}

template <class TT>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_q_kernel(GroupCodes q, int64_t first_row, int64_t rows, UpdateOperands operands, DeviceUpdate update) {
  if (update.skipped()) return;
  const int64_t groups = q.groups(), total = rows * groups;
  UpdateSource<TT> source = {q, operands, update.scalars(), 0.0f, 0};
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < total; i += int64_t(gridDim.x) * kWarps)
    quantize_one(source, q, first_row + i / groups, i % groups, update.rounding);
}

// ---- dequantize -----------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    dequantize_group_kernel(GroupCodes q, Range rows, Range columns, T* out, int64_t ld_out) {
  const int64_t chunks = ceil_div(columns.size(), kEight), total = rows.size() * chunks;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = rows.begin + i / chunks, offset = i % chunks * kEight, column = columns.begin + offset;
    const int count = columns.size() - offset < kEight ? int(columns.size() - offset) : kEight;
    Eight<uint8_t> codes;
    if (q.bits == 8) {
      codes = load8(q.codes + row * q.m + column, count, uint8_t(0));
    } else {
      const uint8_t* packed = q.codes + row * q.row_bytes() + column / 2;
#pragma unroll
      for (int k = 0; k < kEight / 2; ++k) {
        const uint8_t pair = 2 * k < count ? packed[k] : uint8_t(0);
        codes.at[2 * k] = pair >> 4;
        codes.at[2 * k + 1] = pair & 15;
      }
    }
    const int64_t slot = row * q.groups() + column / q.group;  // a chunk lies in one group
    const float scale = q.scale[slot];
    const int zero = q.zero[slot];
    Eight<T> x;
#pragma unroll
    for (int k = 0; k < kEight; ++k) x.at[k] = as_type<T>(decoded(codes.at[k], zero, scale));
    store8(out + (row - rows.begin) * ld_out + offset, x, count);
  }
}

// ---- linear ---------------------------------------------------------------------------------------------------------

// kTokens: room for tokens, of which `tokens` are there. Sums in an order that depends on m only.
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    linear_q_kernel(GroupCodes q, const T* x, int tokens, int64_t n, const T* bias, T* y) {
  const int lane = threadIdx.x % 32;
  const int64_t groups = q.groups();
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < n; row += int64_t(gridDim.x) * kWarps) {
    float acc[kTokens] = {};
    for (int64_t column = lane * kEight; column < q.m; column += 32 * kEight) {
      const int count = q.m - column < kEight ? int(q.m - column) : kEight;
      const Eight<uint8_t> codes = load8(q.codes + row * q.m + column, count, uint8_t(0));
      const int64_t slot = row * groups + column / q.group;
      const float scale = q.scale[slot];
      const int zero = q.zero[slot];
      float w[kEight];
#pragma unroll
      for (int k = 0; k < kEight; ++k) w[k] = decoded(codes.at[k], zero, scale);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tokens) break;
        float v[kEight];
        load_floats(x + t * q.m + column, count, v);
#pragma unroll
        for (int k = 0; k < kEight; ++k) acc[t] = codec::fused(w[k], v[k], acc[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float sum = acc[t];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0 && t < tokens) y[t * n + row] = as_type<T>(bias ? sum + as_float(bias[row]) : sum);
    }
  }
}

}  // namespace

cudaError_t launch_quantize_group(DType type, const void* w, const GroupCodes& q, int64_t rows,
                                  const DeviceRounding& rounding, cudaStream_t stream) {
  const int64_t groups = rows * q.groups();
  if (groups == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(quantize_group_kernel<T>, blocks_for(groups, kWarps), kThreads, 0, stream, static_cast<const T*>(w),
                  q, rows, rounding);
  });
}

cudaError_t launch_update_q(const GroupCodes& q, Range rows, const UpdateOperands& operands, const DeviceUpdate& update,
                            cudaStream_t stream) {
  const int64_t groups = rows.size() * q.groups();
  if (groups == 0) return cudaSuccess;
  return with_float_type(operands.t_type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(update_q_kernel<T>, blocks_for(groups, kWarps), kThreads, 0, stream, q, rows.begin, rows.size(),
                  operands, update);
  });
}

cudaError_t launch_dequantize_group(const GroupCodes& q, Range rows, Range columns, DType type, void* out,
                                    int64_t ld_out, cudaStream_t stream) {
  const int64_t chunks = rows.size() * ceil_div(columns.size(), kEight);
  if (chunks == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(dequantize_group_kernel<T>, blocks_for(chunks, kThreads), kThreads, 0, stream, q, rows, columns,
                  static_cast<T*>(out), ld_out);
  });
}

cudaError_t launch_linear_q(DType type, const GroupCodes& q, const void* x, int64_t tokens, int64_t n, const void* bias,
                            void* y, cudaStream_t stream) {
  if (n == 0 || tokens == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    const auto kernel = tokens <= 1   ? linear_q_kernel<T, 1>
                        : tokens <= 4 ? linear_q_kernel<T, 4>
                                      : linear_q_kernel<T, int(kFewTokens)>;
    return launch(kernel, blocks_for(n, kWarps), kThreads, 0, stream, q, static_cast<const T*>(x), int(tokens), n,
                  static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

}  // namespace slk::cuda
