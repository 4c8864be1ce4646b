// C[m, n] = A[m, k] B[n, k]^T for sm_80 and newer: bf16 or fp16 in and out, fp32 sums, cp.async + ldmatrix + mma.sync.
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
// Operands: how A and B lie in memory, and their way from there to mma's fragments. AlongK is the contract's.
//
// Epilogue: what becomes of the product. Product, which stores it, is every epilogue's base.
//   find    runs while the first copies are under way; it has Epilogue::kSharedBytes of shared memory to itself
//   fill    runs before the sums are rounded into a tile in shared memory, and leaves there what `add` is to join with
//           them; kFills: whether it does. If not, the tile is not read before
//   store   sends the rounded tile to global memory
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/tile_sm80.cuh"
#include "cuda/types.cuh"
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

constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 16;
constexpr int kFragmentsM = kWarpM / kMmaM, kFragmentsN = kWarpN / kMmaN, kSteps = kTileK / kMmaK;

constexpr int kChunksC = kTileN / kChunk;  // chunks of a row of C's tile
static_assert(kSteps == 2, "multiply_tiles alternates between two fragment buffers");

// What a warp multiplies in one step of 16 columns.
struct Fragments {
  uint32_t a[kFragmentsM][4], b[kFragmentsN][2];
};

// Which 64 x 64 of the block's tile a warp computes.
struct WarpTile {
  int m, n, lane;
  __device__ WarpTile() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    m = warp / kWarpsN * kWarpM;
    n = warp % kWarpsN * kWarpN;
  }
};

// ldmatrix of four 8x8 quarters gives mma's b for two pieces of C.
__device__ inline void set_pair(Fragments& f, int j, const uint32_t (&pair)[4]) {
  f.b[j][0] = pair[0];
  f.b[j][1] = pair[1];
  f.b[j + 1][0] = pair[2];
  f.b[j + 1][1] = pair[3];
}

// A [m, k] and B [n, k], rows along k: a row of a stage is 64 bytes.
struct AlongK {
  using Element = __nv_bfloat16;
  static constexpr int kRowChunks = kTileK / kChunk;

  struct Stage {
    uint4 a[kTileM * kRowChunks], b[kTileN * kRowChunks];
  };

  class Loader {
   public:
    __device__ Loader(const GemmArgs& g, int64_t first_m, int64_t first_n)
        : a_(g.a, g.m, g.k, g.lda, first_m), b_(g.b, g.n, g.k, g.ldb, first_n) {}
    __device__ void load_next(Stage& stage) {
      a_.load_next(stage.a);
      b_.load_next(stage.b);
    }

   private:
    RowLoader<kTileM, kRowChunks, kThreads> a_;
    RowLoader<kTileN, kRowChunks, kThreads> b_;
  };

  // Of a [16, 16] piece of A: rows 0-7 and 8-15 of columns 0-7, then of 8-15, as mma's a wants them. Of 16 rows of B:
  // columns 0-7 and 8-15 of rows 0-7, then of rows 8-15.
  static __device__ void load(const Stage& stage, const WarpTile& warp, int step, Fragments& f) {
    const int chunk = step * (kMmaK / kChunk), lane = warp.lane;
    const int at_a = swizzled<kRowChunks>(warp.m + lane % 16, chunk + lane / 16);
    const int at_b = swizzled<kRowChunks>(warp.n + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) ptx::ldmatrix_x4(f.a[i], &stage.a[at_a + i * kMmaM * kRowChunks]);
#pragma unroll
    for (int j = 0; j < kFragmentsN; j += 2) {
      uint32_t pair[4];
      ptx::ldmatrix_x4(pair, &stage.b[at_b + j * kMmaN * kRowChunks]);
      set_pair(f, j, pair);
    }
  }
};

template <class Operands>
constexpr size_t kStagesBytes = kStages * sizeof(typename Operands::Stage);

using Sums = float[kFragmentsM][kFragmentsN][4];

template <class T>
__device__ inline void multiply(const Fragments& f, Sums& sums) {
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j)
      if constexpr (std::is_same_v<T, __half>)
        ptx::mma_m16n8k16_f16(sums[i][j], f.a[i], f.b[j]);
      else
        ptx::mma_m16n8k16_bf16(sums[i][j], f.a[i], f.b[j]);
}

// The pipeline over the `tiles` of k. On entry to the loop's body for tile t: its fragments for step 0 are in `f[0]`,
// copies of tiles t+1 and t+2 are under way, and every warp is past its reads of tile t-1. meanwhile() runs while the
// first copies are under way.
template <class Operands, class F>
__device__ void multiply_tiles(typename Operands::Stage* stages, typename Operands::Loader& loader, int tiles,
                               const WarpTile& warp, Sums& sums, F meanwhile) {
  using T = typename Operands::Element;
#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < tiles) loader.load_next(stages[t]);
    ptx::commit_group();  // an empty group keeps the count: group t is tile t
  }
  meanwhile();
  ptx::wait_group<kStages - 2>();
  __syncthreads();
  Fragments f[2];
  Operands::load(stages[0], warp, 0, f[0]);

  int stage = 0, free_stage = kStages - 1;
  for (int t = 0; t < tiles; ++t) {
    if (t + kStages - 1 < tiles) loader.load_next(stages[free_stage]);
    ptx::commit_group();
    Operands::load(stages[stage], warp, 1, f[1]);
    multiply<T>(f[0], sums);

    ptx::wait_group<kStages - 2>();  // this thread's part of tile t+1 is here
    __syncthreads();                 // everybody's is, and everybody has read its last fragments of tile t
    free_stage = stage;
    stage = (stage + 1) % kStages;
    if (t + 1 < tiles) Operands::load(stages[stage], warp, 0, f[0]);
    multiply<T>(f[1], sums);
  }
}

// C's tile, rounded, which takes the place of the stages: chunk c of row r lies at c ^ (r % 8), so that the eight rows
// that a warp writes at once lie on different banks.
template <class T>
__device__ inline Vector<T>& chunk_of(Vector<T>* tile, int row, int chunk) {
  return tile[swizzled<kChunksC>(row, chunk)];
}

struct Product {
  static constexpr bool kFills = false;
  static constexpr size_t kSharedBytes = 0;
  __device__ void find(const GemmArgs&, int64_t, int64_t, void*) const {}

  // A warp stores whole rows of 512 bytes.
  template <class T>
  __device__ void store(const GemmArgs& g, int64_t first_m, int64_t first_n, Vector<T>* tile) const {
    auto* c = static_cast<T*>(g.c);
    for (int at = threadIdx.x; at < kTileM * kChunksC; at += kThreads) {
      const int row = at / kChunksC, chunk = at % kChunksC;
      const int64_t i = first_m + row, j = first_n + chunk * kChunk;
      if (i >= g.m || j >= g.n) continue;
      const Vector<T>& from = chunk_of(tile, row, chunk);
      T* to = c + i * g.ldc + j;
      if (j + kChunk <= g.n) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&from);
      } else {
        for (int e = 0; j + e < g.n; ++e) to[e] = from.at[e];
      }
    }
  }
};

template <class T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ float2 widen(Type x) { return __bfloat1622float2(x); }
  static __device__ Type narrow(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
};
template <>
struct PairOf<__half> {
  using Type = __half2;
  static __device__ float2 widen(Type x) { return __half22float2(x); }
  static __device__ Type narrow(float2 x) { return __floats2half2_rn(x.x, x.y); }
};

template <class T, class Epilogue>
__device__ void store_tile(const GemmArgs& g, int64_t first_m, int64_t first_n, Vector<T>* tile, const WarpTile& warp,
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
        auto* pairs = reinterpret_cast<typename PairOf<T>::Type*>(chunk_of(tile, row, chunk).at);
        float2 c = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        if constexpr (Epilogue::kFills) c = epilogue.add(c, PairOf<T>::widen(pairs[warp.lane % 4]));
        pairs[warp.lane % 4] = PairOf<T>::narrow(c);
      }
  __syncthreads();
  epilogue.store(g, first_m, first_n, tile);
}

template <class Operands, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm80_kernel(GemmArgs g, int tile_rows, int tile_columns, Epilogue epilogue) {
  auto* stages = dynamic_shared<typename Operands::Stage>();
  void* epilogue_shared = stages + kStages;
  const int2 tile = tile_of_block(tile_rows, tile_columns);
  const int64_t first_m = int64_t(tile.x) * kTileM, first_n = int64_t(tile.y) * kTileN;
  const WarpTile warp;
  Sums sums = {};
  const auto find = [&] { epilogue.find(g, first_m, first_n, epilogue_shared); };
  if (g.k > 0) {
    typename Operands::Loader loader(g, first_m, first_n);
    multiply_tiles<Operands>(stages, loader, int(ceil_div(g.k, kTileK)), warp, sums, find);
  } else {
    find();
    __syncthreads();
  }
  auto* c_tile = reinterpret_cast<Vector<typename Operands::Element>*>(stages);
  store_tile(g, first_m, first_n, c_tile, warp, sums, epilogue, epilogue_shared);
}

// Launches the product with its epilogue; g has been checked.
template <class Operands = AlongK, class Epilogue>
cudaError_t launch_with(const GemmArgs& g, const Epilogue& epilogue, cudaStream_t stream) {
  const int64_t rows = ceil_div(g.m, kTileM), columns = ceil_div(g.n, kTileN);
  if (rows * columns == 0) return cudaSuccess;
  if (rows * columns > INT32_MAX) return cudaErrorInvalidValue;
  constexpr size_t bytes = kStagesBytes<Operands> + Epilogue::kSharedBytes;
  static_assert(bytes <= 99 * 1024, "more than a block can have on sm_86 and sm_89");
  static_assert(sizeof(uint4) * kTileM * kChunksC <= kStagesBytes<Operands>, "C's tile takes the place of the stages");
  const auto kernel = gemm_sm80_kernel<Operands, Epilogue>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(unsigned(rows * columns)), dim3(kThreads), bytes, stream, g, int(rows), int(columns),
                epilogue);
}

}  // namespace slk::cuda::gemm_sm80
