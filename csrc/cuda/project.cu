// Weight updates, sums of squares, APOLLO's scalars and seeded normals of family `project`. Contract:
// slkernels/project.h.
//
// All are bound by memory. The update reads W, and T from L2 where the dense product has just left it, and writes W: 4
// bytes an element of a bf16 W (6 with a gradient). Eight elements a thread make 16-byte accesses; rows whose start is
// not aligned take elements one by one, from the same cache lines.
#include "cuda/project_vectors.cuh"
#include "slkernels/random_normal.cuh"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kMaxBlocks = 4096;  // beyond, threads take more than one turn: enough to fill any GPU

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  return unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// ---- update ---------------------------------------------------------------------------------------------------------

// A thread takes eight columns of a row at a time; chunks = ceil(m / 8) of them a row.
template <class T, class TT>
__global__ void __launch_bounds__(kThreads) weight_update_kernel(T* w, int64_t m, int64_t first_row, int64_t rows,
                                                                 UpdateOperands operands, DeviceUpdate update) {
  if (update.skipped()) return;
  const UpdateScalars scalars = update.scalars();
  const int64_t chunks = ceil_div(m, kEight), total = rows * chunks;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = first_row + i / chunks, column = i % chunks * kEight;
    const int count = m - column < kEight ? int(m - column) : kEight;
    T* p = w + row * m + column;
    float x[kEight];
    load_floats(p, count, x);
#pragma unroll
    for (int k = 0; k < kEight; ++k) x[k] = codec::multiply(x[k], scalars.decay);
    add_terms<TT, T>(operands, scalars.step, row, column, count, x);
    Eight<T> out;
    if (update.rounding.on()) {
      uint32_t random[kEight];
      random8(update.rounding.bits(), row * m + column, random);
#pragma unroll
      for (int k = 0; k < kEight; ++k) out.at[k] = round_stochastic(x[k], random[k], T());
    } else {
#pragma unroll
      for (int k = 0; k < kEight; ++k) out.at[k] = as_type<T>(x[k]);
    }
    store8(p, out, count);
  }
}

// out = -lr alpha x: what the dense library then adds to W through its own epilogue.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_step_kernel(const T* x, int64_t n, DeviceUpdate update, T* out) {
  const float step = update.scalars().step;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads)
    out[i] = as_type<T>(codec::multiply(step, as_float(x[i])));
}

// ---- sums of squares ------------------------------------------------------------------------------------------------

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(const T* x, int64_t ld, int64_t rows, int64_t columns, float* sums) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < rows; row += int64_t(gridDim.x) * kWarps) {
    float acc = 0;
    for (int64_t column = lane * kEight; column < columns; column += 32 * kEight) {
      float v[kEight];
      load_floats(x + row * ld + column, columns - column < kEight ? int(columns - column) : kEight, v);
#pragma unroll
      for (int k = 0; k < kEight; ++k) acc = codec::fused(v[k], v[k], acc);
    }
    acc = warp_sum(acc);
    if (lane == 0) sums[row] = acc;
  }
}

// A block sums kRowsOfBlock rows of 256 columns: a warp takes every eighth row, a lane eight columns.
// partial [gridDim.y, columns].
template <class T>
__global__ void __launch_bounds__(kThreads)
    column_squares_kernel(const T* x, int64_t ld, int64_t rows, int64_t columns, float* partial) {
  __shared__ float sums[kWarps][32 * kEight];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 * kEight + lane * kEight;
  const int64_t first = int64_t(blockIdx.y) * kSquareRows;
  const int64_t end = first + kSquareRows < rows ? first + kSquareRows : rows;
  const int64_t rest = columns - column;
  const int count = rest < kEight ? (rest < 0 ? 0 : int(rest)) : kEight;
  float acc[kEight] = {};
  for (int64_t row = first + warp; row < end; row += kWarps) {
    float v[kEight];
    load_floats(x + row * ld + column, count, v);
#pragma unroll
    for (int k = 0; k < kEight; ++k) acc[k] = codec::fused(v[k], v[k], acc[k]);
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) sums[warp][lane * kEight + k] = acc[k];
  __syncthreads();
  const int64_t mine = int64_t(blockIdx.x) * 32 * kEight + threadIdx.x;
  if (mine >= columns) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  partial[int64_t(blockIdx.y) * columns + mine] = total;
}

__global__ void __launch_bounds__(kThreads)
    add_rows_kernel(const float* partial, int64_t rows, int64_t columns, float* sums) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  float total = 0;
  for (int64_t row = 0; row < rows; ++row) total += partial[row * columns + column];
  sums[column] = total;
}

// ---- APOLLO's scalars -----------------------------------------------------------------------------------------------

__device__ inline double channel_scale(double n2, double r2) {
  return sqrt(n2) / (sqrt(r2) + 1e-8);
}

// The sum over the block's threads, in every thread; `room` holds a word a warp.
__device__ inline double block_sum(double x, double* room) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // `room` may still be read
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += room[w];
  return total;
}

// One block: some thousands of channels.
__global__ void __launch_bounds__(kFactorThreads)
    factors_kernel(ApolloSums x, const float* found_inf, float* norm, float* factor) {
  __shared__ double room[kFactorThreads / 32];
  if (found_inf && *found_inf != 0) return;
  double all = 0, n2 = 0, r2 = 0;
  for (int64_t c = threadIdx.x; c < x.channels; c += kFactorThreads) {
    n2 += x.n2[c];
    r2 += x.r2[c];
    const double rest = double(x.g2[c]) - (x.residual ? x.r2[c] : 0.0f);
    const double s = x.per_tensor ? 1 : channel_scale(x.n2[c], x.r2[c]);
    all += s * s * (rest < 0 ? 0 : rest);
  }
  all = block_sum(all, room);
  n2 = block_sum(n2, room);
  r2 = block_sum(r2, room);
  const double one = channel_scale(n2, r2), u = sqrt(all) * (x.per_tensor ? one : 1);
  const float before = *norm;
  double growth = 1;
  if (before > 0 && x.limiter > 0) growth = fmax(u / (double(before) + 1e-8), double(x.limiter)) / x.limiter;
  __syncthreads();  // all have read norm
  if (threadIdx.x == 0) {
    if (u < INFINITY) *norm = float(u / growth);
    if (x.per_tensor) *factor = float(one / growth);
  }
  if (x.per_tensor) return;
  for (int64_t c = threadIdx.x; c < x.channels; c += kFactorThreads)
    factor[c] = float(channel_scale(x.n2[c], x.r2[c]) / growth);
}

// ---- normals --------------------------------------------------------------------------------------------------------

// A thread a counter: columns l, 16 + l, 32 + l, 48 + l of a block of 64.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normals_kernel(const int64_t* seed, float scale, int64_t first_row, int64_t rows, int64_t first_column,
                   int64_t columns, T* out) {
  const int64_t counters = ceil_div(columns, kNormalBlock) * kNormalRun, total = rows * counters;
  const uint64_t key = uint64_t(*seed);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / counters, counter = i % counters;
    float z[4];
    normals_of<ScalarWords>(uint32_t(first_column / 4 + counter), uint32_t(first_row + row), key, scale, z);
    const int64_t column = counter / kNormalRun * kNormalBlock + counter % kNormalRun;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e * kNormalRun < columns) out[row * columns + column + e * kNormalRun] = as_type<T>(z[e]);
  }
}

}  // namespace

cudaError_t launch_update(DType type, void* w, int64_t m, Range rows, const UpdateOperands& operands,
                          const DeviceUpdate& update, cudaStream_t stream) {
  const int64_t chunks = rows.size() * ceil_div(m, kEight);
  if (chunks == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    const bool wide = operands.t_type == DType::f32;
    return launch(wide ? weight_update_kernel<T, float> : weight_update_kernel<T, T>, blocks_for(chunks, kThreads),
                  kThreads, 0, stream, static_cast<T*>(w), m, rows.begin, rows.size(), operands, update);
  });
}

cudaError_t launch_fold(DType type, const void* x, int64_t n, const DeviceUpdate& update, void* out,
                        cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(fold_step_kernel<T>, blocks_for(n, kThreads), kThreads, 0, stream, static_cast<const T*>(x), n,
                  update, static_cast<T*>(out));
  });
}

cudaError_t launch_row_squares(DType type, const void* x, int64_t ld, int64_t rows, int64_t columns, float* sums,
                               cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(row_squares_kernel<T>, blocks_for(rows, kWarps), kThreads, 0, stream, static_cast<const T*>(x), ld,
                  rows, columns, sums);
  });
}

cudaError_t launch_column_squares(DType type, const void* x, int64_t ld, int64_t rows, int64_t columns, float* partial,
                                  float* sums, cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  const int64_t parts = ceil_div(rows, kSquareRows);
  if (parts > 0) {
    const dim3 grid(unsigned(ceil_div(columns, 32 * kEight)), unsigned(parts));
    const cudaError_t error = with_float_type(type, [&](auto* tag) {
      using T = Pointee<decltype(tag)>;
      return launch(column_squares_kernel<T>, grid, kThreads, 0, stream, static_cast<const T*>(x), ld, rows, columns,
                    partial);
    });
    if (error != cudaSuccess) return error;
  }
  return launch(add_rows_kernel, unsigned(ceil_div(columns, kThreads)), kThreads, 0, stream, partial, parts, columns,
                sums);
}

cudaError_t launch_apollo_factors(const ApolloSums& sums, const float* found_inf, float* norm, float* factor,
                                  cudaStream_t stream) {
  return launch(factors_kernel, 1, kFactorThreads, 0, stream, sums, found_inf, norm, factor);
}

cudaError_t launch_normals(DType type, const int64_t* seed, float scale, Range rows, Range columns, void* out,
                           cudaStream_t stream) {
  const int64_t counters = rows.size() * ceil_div(columns.size(), kNormalBlock) * kNormalRun;
  if (counters == 0) return cudaSuccess;
  return with_float_type(type, [&](auto* tag) {
    using T = Pointee<decltype(tag)>;
    return launch(normals_kernel<T>, blocks_for(counters, kThreads), kThreads, 0, stream, seed, scale, rows.begin,
                  rows.size(), columns.begin, columns.size(), static_cast<T*>(out));
  });
}

}  // namespace slk::cuda
