// Products with 8x8 blocks on tensor cores: mma.sync m16n8k16, sm_80 and newer. Contract: slkernels/block8.h.
//
// spmm: the sparse side is the 8-wide one. d [16 tokens, 8 rows of S] += a [16 tokens, 16 features] b [16 features, 8
// rows of S]: two blocks of a block row make the 16 features, at two places of x.
//
//   a   one ldmatrix.x4 from the tile of x: 16 tokens x 8 features at each of the two places
//   b   a lane's pair of neighbouring values, straight from memory: 128 bytes a block and warp. Of S^T, whose blocks
//   are
//       read where they lie, the pair is not neighbouring: two loads from the same 128 bytes.
//
// The tile of x stays: 16 MT tokens (MT = 1, 2, 4) with all features, or as many as fit, and S streams past it from L2,
// which costs 16 MT FLOPs a byte, as much as one ldmatrix an mma leaves of the tensor cores' rate (half of an A100's).
// With blocks gathered from memory instead it would be 8. A tile's row is 16 bytes longer than a multiple of 128, so
// that the 8 tokens of an ldmatrix lie on different banks.
//
// sddmm: d [16 features of two blocks, 8 rows] += a [16 features, 16 tokens] b [16 tokens, 8 rows] over feature-major
// copies. Which token is which column of a is free as long as b agrees: a lane takes 8 neighbouring ones, 16 bytes a
// feature, for two steps. The 8 warps of a block share out the tokens of the same 4 blocks and add up at the end, in
// order.
#include "cuda/sparse_rows.cuh"
#include "cuda/types.cuh"
#include "slkernels/block8.h"
#include "slkernels/ptx/cp_async.h"
#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma.h"

namespace slk::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSide = 8, kBlock = kSide * kSide;

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_m16n8k16_f16(d, a, b);
}

// ---- spmm -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 512, kWarps = kThreads / 32;  // one block a multiprocessor: 16 warps hide the loads of S
constexpr int kMma = 16;                               // tokens of an mma
constexpr int kPad = 8;                                // elements between rows of the tile, 16 bytes

template <class T>
struct SpmmArgs {
  const int32_t *crow, *order;
  const T *values, *x;
  T* y;
  float* partial;  // [tokens, 8 block rows]
  int64_t block_rows, tokens, m, n, ldx, ldy, slice;
  bool aligned;  // rows of x start at multiples of 16 bytes
};

// Columns [first, first + width) of the tile's tokens, zeros where x has none.
template <class T>
__device__ void load_tile(const SpmmArgs<T>& p, int64_t first_token, int tokens, int64_t first, int width, T* tile) {
  const int chunks = width / kSide, stride = width + kPad;
  for (int at = threadIdx.x; at < tokens * chunks; at += kThreads) {
    const int r = at / chunks, c = at % chunks;
    const int64_t token = first_token + r, j = first + c * kSide;
    T* to = tile + r * stride + c * kSide;
    const T* from = p.x + token * p.ldx + j;
    const int64_t left = token < p.tokens ? p.m - j : 0;
    if (p.aligned) {
      const int bytes = int(sizeof(T)) * int(left < 0 ? 0 : left < kSide ? left : kSide);
      ptx::cp_async_16(to, bytes ? from : p.x, bytes);
    } else {
      for (int e = 0; e < kSide; ++e) to[e] = e < left ? from[e] : narrow<T>(0);
    }
  }
  ptx::commit_group();
  ptx::wait_group<0>();
}

// This lane's part of b's half for one block: S[8 row + g, 8 col + 2 t] and its neighbour.
template <bool kTransposed, class T>
__device__ uint32_t pair_of(const T* block) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (kTransposed) {
    const auto* bits = reinterpret_cast<const uint16_t*>(block);
    return uint32_t(bits[2 * t * kSide + g]) | uint32_t(bits[(2 * t + 1) * kSide + g]) << 16;
  } else {
    return *reinterpret_cast<const uint32_t*>(block + g * kSide + 2 * t);
  }
}

// sums[u] += the tile's tokens [16 u, 16 u + 16) times the blocks [begin, end) of a row, whose columns lie in the tile.
template <bool kTransposed, int MT, class T, class Col>
__device__ void add_blocks(const SpmmArgs<T>& p, const Col* col, int begin, int end, int64_t first_block, const T* tile,
                           int stride, float (&sums)[MT][4]) {
  const int lane = threadIdx.x % 32;
  const T* mine = tile + lane % 16 * stride;  // ldmatrix: tokens 0-7 and 8-15 at the first place, then at the second
  for (int first = begin; first < end; first += 32) {
    const int count = end - first < 32 ? end - first : 32;
    int column = 0, block = 0;
    if (lane < count) {
      column = int(int64_t(col[first + lane]) - first_block) * kSide;
      block = kTransposed ? p.order[first + lane] : first + lane;
    }
#pragma unroll 4
    for (int k = 0; k < count; k += 2) {
      const bool both = k + 1 < count;
      const int other = both ? k + 1 : k;
      const int c0 = __shfl_sync(kAllLanes, column, k), c1 = __shfl_sync(kAllLanes, column, other);
      const int64_t b0 = __shfl_sync(kAllLanes, block, k), b1 = __shfl_sync(kAllLanes, block, other);
      const uint32_t b[2] = {pair_of<kTransposed>(p.values + b0 * kBlock),
                             both ? pair_of<kTransposed>(p.values + b1 * kBlock) : 0u};
#pragma unroll
      for (int u = 0; u < MT; ++u) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, mine + u * kMma * stride + (lane < 16 ? c0 : c1));
        mma(sums[u], a, b, T());
      }
    }
  }
}

// blockIdx.x: a tile of tokens; blockIdx.y: a part of the block rows, whose rows the warps take in turns.
template <bool kTransposed, int MT, class T, class Col>
__global__ void __launch_bounds__(kThreads, 1) block8_spmm_kernel(SpmmArgs<T> p, const Col* col) {
  T* tile = dynamic_shared<T>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_token = int64_t(blockIdx.x) * MT * kMma, step = int64_t(gridDim.y) * kWarps;
  for (int64_t first = 0; first == 0 || first < p.m; first += p.slice) {
    const int width = int(p.m - first < p.slice ? round_up(p.m - first, 64) : p.slice), stride = width + kPad;
    const bool last = first + p.slice >= p.m;
    if (first) __syncthreads();  // everybody is done with the tile before
    load_tile(p, first_token, MT * kMma, first, width, tile);
    __syncthreads();
    for (int64_t row = int64_t(blockIdx.y) * kWarps + warp; row < p.block_rows; row += step) {
      int begin = p.crow[row], end = p.crow[row + 1];
      if (first) begin = lower_bound(col, begin, end, first / kSide);
      if (!last) end = lower_bound(col, begin, end, (first + p.slice) / kSide);
      const auto for_sums = [&](float (&sums)[MT][4], auto f) {  // f(sum, token, row of S)
#pragma unroll
        for (int u = 0; u < MT; ++u)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            f(sums[u][e], first_token + u * kMma + e / 2 * 8 + g, row * kSide + 2 * t + e % 2);
      };
      float sums[MT][4] = {};
      const int64_t ld = p.block_rows * kSide;
      if (first)
        for_sums(sums, [&](float& s, int64_t token, int64_t i) {
          if (token < p.tokens) s = p.partial[token * ld + i];
        });
      add_blocks<kTransposed, MT>(p, col, begin, end, first / kSide, tile, stride, sums);
      for_sums(sums, [&](float& s, int64_t token, int64_t i) {
        if (token >= p.tokens) return;
        if (!last)
          p.partial[token * ld + i] = s;
        else if (i < p.n)
          p.y[token * p.ldy + i] = narrow<T>(s);
      });
    }
  }
}

// ---- sddmm ----------------------------------------------------------------------------------------------------------

constexpr int kSddmmThreads = 256, kSddmmWarps = kSddmmThreads / 32;
constexpr int kAtOnce = 4;         // blocks of a row that share the loads of dy
constexpr int kRun = 8;            // tokens a lane takes of a feature: 16 bytes
constexpr int kTokens = 4 * kRun;  // that a warp takes: four lanes a feature
static_assert(kTokenPad == kRun, "rows of the copies are whole runs");

template <class T>
__device__ uint4 load_run(const T* rows, int64_t row, int64_t count, int64_t padded, int64_t token) {
  if (row >= count || token >= padded) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(rows + row * padded + token);
}

template <class T, class Col>
__global__ void __launch_bounds__(kSddmmThreads)
    block8_sddmm_kernel(const int32_t* crow, const Col* col, int64_t n, int64_t m, const T* dyt, const T* xt,
                        int64_t padded, T* out) {
  __shared__ float parts[kSddmmWarps][kAtOnce * kBlock];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t row = blockIdx.x;
  const int end = crow[row + 1];
  for (int first = crow[row] + int(blockIdx.y) * kAtOnce; first < end; first += int(gridDim.y) * kAtOnce) {
    int64_t feature[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) feature[b] = first + b < end ? int64_t(col[first + b]) * kSide + g : m;
    float sums[kAtOnce / 2][4] = {};
    for (int64_t token = warp * kTokens + t * kRun; token - t * kRun < padded; token += kSddmmWarps * kTokens) {
      const uint4 dy = load_run(dyt, row * kSide + g, n, padded, token);
#pragma unroll
      for (int pair = 0; pair < kAtOnce / 2; ++pair) {
        const uint4 u = load_run(xt, feature[2 * pair], m, padded, token);
        const uint4 v = load_run(xt, feature[2 * pair + 1], m, padded, token);
        mma(sums[pair], {u.x, v.x, u.y, v.y}, {dy.x, dy.y}, T());
        mma(sums[pair], {u.z, v.z, u.w, v.w}, {dy.z, dy.w}, T());
      }
    }
#pragma unroll
    for (int pair = 0; pair < kAtOnce / 2; ++pair)
#pragma unroll
      for (int e = 0; e < 4; ++e)  // row g of the block 2 pair + e / 2 of d is its column, d's column its row
        parts[warp][(2 * pair + e / 2) * kBlock + (2 * t + e % 2) * kSide + g] = sums[pair][e];
    __syncthreads();
    static_assert(kAtOnce * kBlock == kSddmmThreads, "a thread an entry");
    float total = 0;
    for (int w = 0; w < kSddmmWarps; ++w) total += parts[w][threadIdx.x];
    const int64_t block = first + int(threadIdx.x) / kBlock;
    if (block < end) out[block * kBlock + threadIdx.x % kBlock] = narrow<T>(total);
    __syncthreads();
  }
}

__global__ void order_kernel(int32_t* order, int64_t blocks) {
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k < blocks) order[k] = int32_t(k);
}

// f(element, columns as what they are) for the types that tensor cores take here.
template <class F>
cudaError_t with_types_16(DType dtype, const Csr& grid, F f) {
  const auto with_col = [&](auto element) {
    return grid.col_is_16 ? f(element, static_cast<const int16_t*>(grid.col))
                          : f(element, static_cast<const int32_t*>(grid.col));
  };
  if (dtype == DType::bf16) return with_col(__nv_bfloat16());
  if (dtype == DType::f16) return with_col(__half());
  return cudaErrorInvalidValue;
}

template <bool kTransposed, int MT, class T, class Col>
cudaError_t run_spmm(const Block8Plan& plan, const SpmmArgs<T>& args, const Col* col, cudaStream_t stream) {
  const auto kernel = block8_spmm_kernel<kTransposed, MT, T, Col>;
  const size_t bytes = size_t(plan.tokens) * size_t(plan.slice + kPad) * sizeof(T);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(ceil_div(args.tokens, plan.tokens)), unsigned(plan.parts));
  return launch(kernel, grid, kThreads, bytes, stream, args, col);
}

}  // namespace

Block8Plan plan_block8(int64_t tokens, const Csr& grid, int64_t shared_bytes, int multiprocessors) {
  const int64_t features = round_up(grid.m * kSide > 0 ? grid.m * kSide : 1, 64);
  const auto fits = [&](int64_t width, int64_t rows) { return rows * (width + kPad) * 2 <= shared_bytes; };
  Block8Plan plan = {16, features, 1, 1};
  for (const int rows : {64, 32})
    if (tokens > rows / 2 && fits(features, rows)) {
      plan.tokens = rows;
      break;
    }
  while (!fits(plan.slice, plan.tokens)) plan.slice -= 64;
  plan.slices = ceil_div(features, plan.slice);
  // Two blocks a multiprocessor in all, and a block row for each of their warps.
  const int64_t tiles = ceil_div(tokens, plan.tokens), most = ceil_div(grid.n, kWarps);
  const int64_t wanted = tiles > 0 ? ceil_div(2 * multiprocessors, tiles) : 1;
  plan.parts = wanted < most ? wanted : most;
  return plan;
}

cudaError_t launch_block8_spmm(DType dtype, const Block8Plan& plan, const Blocks& s, const void* values,
                               const Matrix& x, const Matrix& y, float* partial, cudaStream_t stream) {
  if (plan.slice % 64 != 0 || plan.slice <= 0) return cudaErrorInvalidValue;
  if (y.rows == 0 || y.cols == 0) return cudaSuccess;
  return with_types_16(dtype, s.grid, [&](auto element, auto* col) {
    using T = decltype(element);
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    const SpmmArgs<T> args = {s.grid.crow,
                              s.order,
                              static_cast<const T*>(values),
                              static_cast<const T*>(x.data),
                              static_cast<T*>(y.data),
                              partial,
                              s.grid.n,
                              y.rows,
                              x.cols,
                              y.cols,
                              x.ld,
                              y.ld,
                              plan.slice,
                              reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.ld % 8 == 0};
    const auto with_order = [&](auto rows) {
      return s.order ? run_spmm<true, rows / kMma, T, Col>(plan, args, col, stream)
                     : run_spmm<false, rows / kMma, T, Col>(plan, args, col, stream);
    };
    return plan.tokens == 64   ? with_order(std::integral_constant<int, 64>())
           : plan.tokens == 32 ? with_order(std::integral_constant<int, 32>())
                               : with_order(std::integral_constant<int, 16>());
  });
}

cudaError_t launch_block8_sddmm(DType dtype, const Csr& grid, int64_t n, int64_t m, const void* dyt, const void* xt,
                                int64_t tokens, void* out, cudaStream_t stream) {
  if (grid.nnz == 0) return cudaSuccess;
  constexpr unsigned kPasses = 4;  // blocks a block row: a row of 5 % of 4096 has 26 blocks of S, 7 times kAtOnce
  return with_types_16(dtype, grid, [&](auto element, auto* col) {
    using T = decltype(element);
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    return launch(block8_sddmm_kernel<T, Col>, dim3(unsigned(grid.n), kPasses), kSddmmThreads, 0, stream, grid.crow,
                  col, n, m, static_cast<const T*>(dyt), static_cast<const T*>(xt), padded_tokens(tokens),
                  static_cast<T*>(out));
  });
}

cudaError_t launch_block8_order(int32_t* order, int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  constexpr int kCount = 256;
  return launch(order_kernel, unsigned(ceil_div(blocks, kCount)), kCount, 0, stream, order, blocks);
}

}  // namespace slk::cuda
