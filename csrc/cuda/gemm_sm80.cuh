// C[m, n] = A[m, k] B[n, k]^T for sm_80 and newer: bf16 in and out, fp32 sums, cp.async + ldmatrix + mma.sync.
// Contract: slkernels/gemm.h. An element is one chain of sums over k in ascending steps of 16, whatever the grid.
//
// A block computes one 128 x 256 tile of C; each of its eight warps 64 x 64 of it. Data flow, for each 32 columns of k:
//
//   global --cp.async--> shared (ring of 4 stages) --ldmatrix--> registers (2 buffers) --mma.sync--> 128 sums a thread
//
//   load tile t+3       |  copies of three tiles are under way while one is multiplied
//   load fragments s+1  |  the next 16 columns come into one register buffer while the other is multiplied
//   multiply s          |  32 mma of 16 x 8 x 16 a warp
//
// One barrier a tile: after the wait for tile t+1, and before the stage of tile t-1 is filled anew; see
// `multiply_tiles`.
//
// Why these sizes:
//   128 x 256  a tile of k costs (128 + 256) * 64 = 24 KB from L2 for 2^20 multiply-adds. At an A100's 1024 a cycle and
//              multiprocessor that is 24 bytes a cycle, half of what its L2 gives; 128 x 128 would ask for 32.
//   64 x 64    the most a warp can hold: 128 sums, and fragments for 64 + 64 rows. The eight warps together read
//              8 * 128 rows * 64 bytes = 64 KB of shared memory a tile, 512 of the 1024 cycles that its multiply-adds
//              take; with the 192 to write it, shared memory is busy 70 % of the time. 64 x 32 would need more than
//              all.
//   32         columns a stage, so that four stages take 96 KB and fit every architecture from sm_80 on (sm_86: 99 KB).
//   4 stages   three in flight cover 3 * 1024 cycles: more than the latency of global memory.
//   256        threads: two warps a scheduler, at up to 255 registers each.
//
// A row of a stage is 64 bytes: four chunks of 16. Chunk c of row r lies at chunk c ^ (r / 2 % 4): any eight rows that
// start at a multiple of 8 then have their chunk c in eight different 16-byte columns of the banks (two rows make a
// 128-byte line), so that neither ldmatrix nor cp.async meets a bank twice.
//
// Epilogue: what stands in C besides the product.
//   find    runs while the first copies are under way; it has Epilogue::kSharedBytes of shared memory to itself
//   fill    runs before the sums are stored, and leaves in the tile (bf16) what `add` is to join with them
//   kFills  whether it does; if not, the tile is not read and the sums are C
#pragma once

#include <cuda_bf16.h>

#include "slkernels/gemm.h"
#include "slkernels/launch.cuh"
#include "slkernels/ptx/cp_async.h"
#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma.h"
#include "slkernels/types.h"

namespace slk::cuda::gemm_sm80 {

constexpr int kTileM = 128, kTileN = 256, kTileK = 32;
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kStages = 4;
constexpr int kWarpsN = kTileN / kWarpN, kThreads = kTileM / kWarpM * kWarpsN * 32;
constexpr int kBand = 8;  // tile rows that are walked together: a wave of 108 blocks then reads about 8 x 14 tiles

constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 16;
constexpr int kFragmentsM = kWarpM / kMmaM, kFragmentsN = kWarpN / kMmaN, kSteps = kTileK / kMmaK;

constexpr int kChunk = 8;                          // elements of a 16-byte chunk
constexpr int kRowChunks = kTileK / kChunk;        // chunks of a row of a stage
constexpr int kRowsAPass = kThreads / kRowChunks;  // rows that the block copies with one cp.async a thread
constexpr int kPassesA = kTileM / kRowsAPass, kPassesB = kTileN / kRowsAPass;
constexpr int kChunksC = kTileN / kChunk;  // chunks of a row of C's tile
static_assert(kSteps == 2, "multiply_tiles alternates between two fragment buffers");
static_assert(kRowsAPass % 8 == 0, "the rows of a thread's passes share one swizzle");

struct __align__(16) Chunk {
  __nv_bfloat16 e[kChunk];
};
struct Stage {
  Chunk a[kTileM * kRowChunks], b[kTileN * kRowChunks];
};
constexpr size_t kSharedBytes = kStages * sizeof(Stage);
static_assert(kSharedBytes <= 99 * 1024, "more than a block can have on sm_86 and sm_89");
static_assert(sizeof(Chunk) * kTileM * kChunksC <= kSharedBytes, "C's tile takes the place of the stages");

__device__ inline int swizzled(int row, int chunk) {
  return row * kRowChunks + (chunk ^ (row / 2 % kRowChunks));
}

// Copies one thread's part of the tiles of A and B, tile after tile along k: in every tile the same chunk of the rows
// row, row + kRowsAPass, ... Rows beyond m or n and columns beyond k become zeros.
class TileLoader {
 public:
  __device__ TileLoader(const GemmArgs& g, int64_t first_m, int64_t first_n)
      : row_(threadIdx.x / kRowChunks), chunk_(threadIdx.x % kRowChunks), columns_left_(g.k - chunk_ * kChunk) {
    rows_a_ = g.m - first_m - row_;
    rows_b_ = g.n - first_n - row_;
    stride_a_ = g.lda * kRowsAPass;
    stride_b_ = g.ldb * kRowsAPass;
    a_ = static_cast<const __nv_bfloat16*>(g.a) + (first_m + row_) * g.lda + chunk_ * kChunk;
    b_ = static_cast<const __nv_bfloat16*>(g.b) + (first_n + row_) * g.ldb + chunk_ * kChunk;
  }

  __device__ void load_next(Stage& stage) {
    const int64_t bytes_left = columns_left_ * int64_t(sizeof(__nv_bfloat16));
    const int bytes = bytes_left >= 16 ? 16 : bytes_left > 0 ? int(bytes_left) : 0;
    const int offset = swizzled(row_, chunk_);
#pragma unroll
    for (int i = 0; i < kPassesA; ++i)
      ptx::cp_async_16(&stage.a[offset + i * kRowsAPass * kRowChunks], a_ + i * stride_a_,
                       i * kRowsAPass < rows_a_ ? bytes : 0);
#pragma unroll
    for (int i = 0; i < kPassesB; ++i)
      ptx::cp_async_16(&stage.b[offset + i * kRowsAPass * kRowChunks], b_ + i * stride_b_,
                       i * kRowsAPass < rows_b_ ? bytes : 0);
    a_ += kTileK;
    b_ += kTileK;
    columns_left_ -= kTileK;
  }

 private:
  int row_, chunk_;
  int64_t columns_left_, rows_a_, rows_b_, stride_a_, stride_b_;
  const __nv_bfloat16 *a_, *b_;
};

// What a warp multiplies in one step of 16 columns.
struct Fragments {
  uint32_t a[kFragmentsM][4], b[kFragmentsN][2];
};

// Which 64 x 64 of the block's tile a warp computes, and how it reads its rows.
struct WarpTile {
  int m, n, lane;
  __device__ WarpTile() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    m = warp / kWarpsN * kWarpM;
    n = warp % kWarpsN * kWarpN;
  }

  // ldmatrix of four 8x8 quarters. Of a [16, 16] piece of A: rows 0-7 and 8-15 of columns 0-7, then of 8-15, as mma's a
  // wants them. Of 16 rows of B: columns 0-7 and 8-15 of rows 0-7, then of rows 8-15: mma's b for two pieces of C.
  __device__ void load(const Stage& stage, int step, Fragments& f) const {
    const int chunk = step * (kMmaK / kChunk);
    const int row_a = m + lane % 16, chunk_a = chunk + lane / 16;
    const int row_b = n + lane / 16 * 8 + lane % 8, chunk_b = chunk + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i)
      ptx::ldmatrix_x4(f.a[i], &stage.a[swizzled(row_a, chunk_a) + i * kMmaM * kRowChunks]);
#pragma unroll
    for (int j = 0; j < kFragmentsN; j += 2) {
      uint32_t pair[4];
      ptx::ldmatrix_x4(pair, &stage.b[swizzled(row_b, chunk_b) + j * kMmaN * kRowChunks]);
      f.b[j][0] = pair[0];
      f.b[j][1] = pair[1];
      f.b[j + 1][0] = pair[2];
      f.b[j + 1][1] = pair[3];
    }
  }
};

using Sums = float[kFragmentsM][kFragmentsN][4];

__device__ inline void multiply(const Fragments& f, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) ptx::mma_m16n8k16_bf16(sums[i][j], f.a[i], f.b[j]);
}

// The pipeline over the `tiles` of k. On entry to the loop's body for tile t: its fragments for step 0 are in `f[0]`,
// copies of tiles t+1 and t+2 are under way, and every warp is past its reads of tile t-1. meanwhile() runs while the
// first copies are under way.
template <class F>
__device__ void multiply_tiles(Stage* stages, TileLoader& loader, int tiles, const WarpTile& warp, Sums& sums,
                               F meanwhile) {
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < tiles) loader.load_next(stages[t]);
    ptx::commit_group();  // an empty group keeps the count: group t is tile t
  }
  meanwhile();
  ptx::wait_group<kStages - 2>();
  __syncthreads();
  Fragments f[2];
  warp.load(stages[0], 0, f[0]);

  int stage = 0, free_stage = kStages - 1;
  for (int t = 0; t < tiles; ++t) {
    if (t + kStages - 1 < tiles) loader.load_next(stages[free_stage]);
    ptx::commit_group();
    warp.load(stages[stage], 1, f[1]);
    multiply(f[0], sums);

    ptx::wait_group<kStages - 2>();  // this thread's part of tile t+1 is here
    __syncthreads();                 // everybody's is, and everybody has read its last fragments of tile t
    free_stage = stage;
    stage = (stage + 1) % kStages;
    if (t + 1 < tiles) warp.load(stages[stage], 0, f[0]);
    multiply(f[1], sums);
  }
}

// Rounds the sums and sends them to C through shared memory, so that a warp stores whole rows of 512 bytes. Chunk c of
// row r of C's tile lies at c ^ (r % 8): the eight rows that a warp writes at once lie on different banks.
__device__ inline Chunk& chunk_of(Chunk* tile, int row, int chunk) {
  return tile[row * kChunksC + (chunk ^ (row % 8))];
}
template <class Epilogue>
__device__ void store_tile(const GemmArgs& g, int64_t first_m, int64_t first_n, Chunk* tile, const WarpTile& warp,
                           const Sums& sums, const Epilogue& epilogue, const void* epilogue_shared) {
  if constexpr (Epilogue::kFills) {
    epilogue.fill(g, first_m, first_n, tile, epilogue_shared);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp.m + i * kMmaM + half * 8 + warp.lane / 4, chunk = (warp.n + j * kMmaN) / kChunk;
        auto* pairs = reinterpret_cast<__nv_bfloat162*>(chunk_of(tile, row, chunk).e);
        float2 c = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        if constexpr (Epilogue::kFills) c = epilogue.add(c, __bfloat1622float2(pairs[warp.lane % 4]));
        pairs[warp.lane % 4] = __floats2bfloat162_rn(c.x, c.y);
      }
  __syncthreads();
  auto* c = static_cast<__nv_bfloat16*>(g.c);
  for (int at = threadIdx.x; at < kTileM * kChunksC; at += kThreads) {
    const int row = at / kChunksC, chunk = at % kChunksC;
    const int64_t i = first_m + row, j = first_n + chunk * kChunk;
    if (i >= g.m || j >= g.n) continue;
    const Chunk& from = chunk_of(tile, row, chunk);
    __nv_bfloat16* to = c + i * g.ldc + j;
    if (j + kChunk <= g.n) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&from);
    } else {
      for (int e = 0; j + e < g.n; ++e) to[e] = from.e[e];
    }
  }
}

// Tiles are walked in bands of kBand rows, column by column, so that blocks that run together share rows of A and B in
// L2. The last band may be lower.
__device__ inline int2 tile_of_block(int rows, int columns) {
  const int band = blockIdx.x / (kBand * columns), at = blockIdx.x % (kBand * columns);
  const int height = min(kBand, rows - band * kBand);
  return make_int2(band * kBand + at % height, at / height);
}

template <class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm80_kernel(GemmArgs g, int tile_rows, int tile_columns, Epilogue epilogue) {
  Stage* stages = dynamic_shared<Stage>();
  void* epilogue_shared = stages + kStages;
  const int2 tile = tile_of_block(tile_rows, tile_columns);
  const int64_t first_m = int64_t(tile.x) * kTileM, first_n = int64_t(tile.y) * kTileN;
  const WarpTile warp;
  Sums sums = {};
  const auto find = [&] { epilogue.find(g, first_m, first_n, epilogue_shared); };
  if (g.k > 0) {
    TileLoader loader(g, first_m, first_n);
    multiply_tiles(stages, loader, int(ceil_div(g.k, kTileK)), warp, sums, find);
  } else {
    find();
    __syncthreads();
  }
  store_tile(g, first_m, first_n, reinterpret_cast<Chunk*>(stages), warp, sums, epilogue, epilogue_shared);
}

// Launches the product with its epilogue; g has been checked.
template <class Epilogue>
cudaError_t launch_with(const GemmArgs& g, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t rows = ceil_div(g.m, kTileM), columns = ceil_div(g.n, kTileN);
  if (rows * columns == 0) return cudaSuccess;
  if (rows * columns > INT32_MAX) return cudaErrorInvalidValue;
  constexpr size_t bytes = kSharedBytes + Epilogue::kSharedBytes;
  static_assert(bytes <= 99 * 1024, "more than a block can have on sm_86 and sm_89");
  const auto kernel = gemm_sm80_kernel<Epilogue>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(unsigned(rows * columns)), dim3(kThreads), bytes, stream, g, int(rows), int(columns),
                epilogue);
}

}  // namespace slk::cuda::gemm_sm80
