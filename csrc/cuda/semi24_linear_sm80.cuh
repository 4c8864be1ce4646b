// y [T, n] = act(x [T, m] W^T + bias), W 2:4 in layout sm80, for sm_80 and newer: cp.async + ldmatrix + mma.sp.sync,
// sums in fp32. Contract: slkernels/semi24_gemm.h, layout: slkernels/semi24.h. The sparse operand of mma.sp is its
// left one: a block computes a tile of D [n, T] = W x^T, an element of which is one chain of sums over m in ascending
// steps of 32, whatever the grid. Data flow, for each 64 columns of m:
//
//   values, x  global --cp.async--> shared (ring of stages) --ldmatrix--> registers (2 buffers) --+
//   meta       global ------------------------------------> registers (a tile ahead) -------------+--mma.sp--> sums
//
// The reordered metadata are 32-bit words, [M / 32, N]: word (p, row) of a lane for row = 32 i + lane is what mma.sp
// takes for columns 32 p to 32 p + 31 of rows 32 i to 32 i + 31, the lower 16 of them with selector 0 (mma_sp.h). A
// warp reads them as they are, 128 bytes at a time, and shared memory is left to the operands.
//
// A tile has kSteps steps of 32 columns, a step has two halves of the warp's tokens. While one half is multiplied, the
// fragments of the next come in: half 1 of x; then W and half 0 of x of the next step.
//
// Tiles [features of D, tokens], and why:
//   Large 256 x 128, warps of 64 x 64. W comes at half its size: 256 x 128 costs 34 KB from L2 for 64 columns, 128 x
//         256 would cost 41 KB. At an A100's 2048 (dense) multiply-adds a cycle and multiprocessor a tile takes 1024
//         cycles: 34 bytes a cycle, of about 47 that its L2 gives. 128 sums a thread are what fits; warps of 64 x 64
//         then read 8 * 12 KB of shared memory a tile in 768 cycles, and 256 to write it: shared memory is as busy as
//         the tensor cores.
//         64 columns a stage, so that a row of x fills a line of 128 bytes; three stages then take 96 KB and fit every
//         architecture from sm_80 on (sm_86: 99 KB), two of them in flight for 2 * 1024 cycles.
//   Small 64 x 64, warps of 32 x 32, for few tokens: reading W is then all the work, and many blocks are wanted for it;
//         six stages keep 5 * 4 KB of W on their way to each block, two blocks share a multiprocessor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/tile_sm80.cuh"
#include "cuda/types.cuh"
#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma_sp.h"
#include "slkernels/semi24_activation.cuh"
#include "slkernels/semi24_gemm.h"

namespace slk::cuda::linear24_sm80 {

constexpr int kTileK = 64;
constexpr int kMmaN = 16, kMmaT = 8, kMmaK = 32;  // features, tokens and columns of an mma.sp
constexpr int kSteps = kTileK / kMmaK;
constexpr int kMetaRows = 32;  // rows that a word of metadata a lane serves

constexpr int kChunksW = kTileK / 2 / kChunk, kChunksX = kTileK / kChunk;  // of a row of a stage

template <int kN_, int kT_, int kWarpN_, int kWarpT_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kN = kN_, kT = kT_, kWarpN = kWarpN_, kWarpT = kWarpT_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, as far as registers go
  static constexpr int kWarpsT = kT / kWarpT, kThreads = kN / kWarpN * kWarpsT * 32;
  static constexpr int kFragmentsN = kWarpN / kMmaN, kFragmentsT = kWarpT / kMmaT, kHalf = kFragmentsT / 2;
  static constexpr int kMetaWords = kWarpN / kMetaRows;

  struct Stage {
    uint4 w[kN * kChunksW], x[kT * kChunksX];
  };
  static constexpr size_t kSharedBytes = kStages * sizeof(Stage);
  static_assert(kSharedBytes <= 99 * 1024, "more than a block can have on sm_86 and sm_89");

  using Sums = float[kFragmentsN][kFragmentsT][4];
  using FragmentsW = uint32_t[kFragmentsN][4];
  using FragmentsX = uint32_t[kHalf][4];
  using Meta = uint32_t[kSteps][kMetaWords];
};
struct Large : Tile<256, 128, 64, 64, 3, 1> {};
struct Small : Tile<64, 64, 32, 32, 6, 2> {};

// Where in the block's tile a warp computes, and how it reads its operands.
template <class Tile>
struct Warp {
  int n, t, lane;
  __device__ Warp() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    n = warp / Tile::kWarpsT * Tile::kWarpN;
    t = warp % Tile::kWarpsT * Tile::kWarpT;
  }

  // Four 8x8 quarters: kept columns 0-7 of rows 0-7 and 8-15, then columns 8-15.
  __device__ void load_w(const typename Tile::Stage& stage, int step, typename Tile::FragmentsW& w) const {
    const int at = swizzled<kChunksW>(n + lane % 16, step * (kMmaK / 2 / kChunk) + lane / 16);
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN; ++i) ptx::ldmatrix_x4(w[i], &stage.w[at + i * kMmaN * kChunksW]);
  }
  // Columns 0-7, 8-15, 16-23, 24-31 of eight tokens.
  __device__ void load_x(const typename Tile::Stage& stage, int step, int half, typename Tile::FragmentsX& x) const {
    const int at = swizzled<kChunksX>(t + lane % 8, step * (kMmaK / kChunk) + lane / 8);
#pragma unroll
    for (int j = 0; j < Tile::kHalf; ++j)
      ptx::ldmatrix_x4(x[j], &stage.x[at + (half * Tile::kHalf + j) * kMmaT * kChunksX]);
  }
};

// The metadata of the warp's rows, a tile after the other. Rows beyond the pack keep (0, 1) of every four: any code
// does, for their values are zero.
template <class Tile>
class MetaLoader {
  static constexpr uint32_t kFirstTwo = 0x44444444u;

 public:
  __device__ MetaLoader(const Linear24Args& g, int64_t row, int lane) : rows_(padded_rows24(Layout24::sm80, g.n)) {
    from_ = static_cast<const uint32_t*>(g.meta) + row + lane;
    words_ = int(max(int64_t(0), min(int64_t(Tile::kMetaWords), (rows_ - row) / kMetaRows)));
  }

  __device__ void load_next(typename Tile::Meta& meta) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < Tile::kMetaWords; ++i)
        meta[step][i] = i < words_ ? __ldg(from_ + step * rows_ + i * kMetaRows) : kFirstTwo;
    from_ += kSteps * rows_;
  }

 private:
  const uint32_t* from_;
  int64_t rows_;
  int words_;
};

template <class T, int kSelector>
__device__ inline void mma_sp(float (&d)[4], const uint32_t (&w)[4], const uint32_t (&x)[4], uint32_t meta) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_sp_m16n8k32_f16<kSelector>(d, w, x, meta);
  else
    ptx::mma_sp_m16n8k32_bf16<kSelector>(d, w, x, meta);
}

template <class T, class Tile>
__device__ void multiply(const typename Tile::FragmentsW& w, const uint32_t (&meta)[Tile::kMetaWords],
                         const typename Tile::FragmentsX& x, int half, typename Tile::Sums& sums) {
#pragma unroll
  for (int j = 0; j < Tile::kHalf; ++j)
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN; i += 2) {
      mma_sp<T, 0>(sums[i][half * Tile::kHalf + j], w[i], x[j], meta[i / 2]);
      mma_sp<T, 1>(sums[i + 1][half * Tile::kHalf + j], w[i + 1], x[j], meta[i / 2]);
    }
}

// The pipeline over the `tiles` of m. On entry to the loop's body for tile t: fragments of its first half are in w[0]
// and x[0], its metadata in meta, copies of the next kStages - 2 tiles are under way, and every warp is past its reads
// of tile t-1.
template <class T, class Tile>
__device__ void multiply_tiles(const Linear24Args& g, int64_t first_n, int64_t first_t, typename Tile::Stage* stages,
                               const Warp<Tile>& warp, typename Tile::Sums& sums) {
  constexpr int kStages = Tile::kStages;
  const int64_t rows = padded_rows24(Layout24::sm80, g.n), kept = padded_columns24(Layout24::sm80, g.m) / 2;
  const int tiles = int(kept / (kTileK / 2));
  RowLoader<Tile::kN, kChunksW, Tile::kThreads> w_loader(g.values, rows, kept, kept, first_n);
  RowLoader<Tile::kT, kChunksX, Tile::kThreads> x_loader(g.x, g.tokens, g.m, g.ld_x, first_t);
  MetaLoader<Tile> meta_loader(g, first_n + warp.n, warp.lane);
  const auto load_tile = [&](typename Tile::Stage& stage) {
    w_loader.load_next(stage.w);
    x_loader.load_next(stage.x);
  };

#pragma unroll
  for (int t = 0; t < kStages - 1; ++t) {
    if (t < tiles) load_tile(stages[t]);
    ptx::commit_group();  // an empty group keeps the count: group t is tile t
  }
  typename Tile::Meta meta, next_meta;
  if (tiles > 0) meta_loader.load_next(meta);
  ptx::wait_group<kStages - 2>();
  __syncthreads();
  typename Tile::FragmentsW w[2];
  typename Tile::FragmentsX x[2];
  if (tiles > 0) {
    warp.load_w(stages[0], 0, w[0]);
    warp.load_x(stages[0], 0, 0, x[0]);
  }

  int stage = 0, free_stage = kStages - 1;
  for (int t = 0; t < tiles; ++t) {
    if (t + kStages - 1 < tiles) load_tile(stages[free_stage]);
    ptx::commit_group();
    if (t + 1 < tiles) meta_loader.load_next(next_meta);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      warp.load_x(stages[stage], step, 1, x[1]);
      multiply<T, Tile>(w[step % 2], meta[step], x[0], 0, sums);
      if (step + 1 < kSteps) {
        warp.load_w(stages[stage], step + 1, w[(step + 1) % 2]);
        warp.load_x(stages[stage], step + 1, 0, x[0]);
      } else {
        ptx::wait_group<kStages - 2>();  // this thread's part of tile t+1 is here
        __syncthreads();                 // everybody's is, and everybody has read its last fragments of tile t
        free_stage = stage;
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (t + 1 < tiles) {
          warp.load_w(stages[stage], 0, w[0]);
          warp.load_x(stages[stage], 0, 0, x[0]);
        }
      }
      multiply<T, Tile>(w[step % 2], meta[step], x[1], 1, sums);
    }
#pragma unroll
    for (int i = 0; i < kSteps * Tile::kMetaWords; ++i)
      meta[i / Tile::kMetaWords][i % Tile::kMetaWords] = next_meta[i / Tile::kMetaWords][i % Tile::kMetaWords];
  }
  static_assert(kSteps % 2 == 0, "step 0 of every tile finds its W in w[0]");
}

// D leaves transposed, as rows of y, through shared memory, where it lies as fp32 [tokens, features]: activations and
// the rounding then run over eight neighbouring features a thread, in a loop that is not unrolled over 128 registers.
// Half of the tokens at a time: what x's halves are.
//
// An octet of features is two float4, which lie half a row apart; octet c of row r at c ^ r / 2 % 4 in the first half,
// at that ^ 4 in the second. A store of a fragment's d[e] (rows 2t + e, t < 4; eight features: two float4) and a read
// of eight neighbouring octets then both meet every 16-byte column of the banks once.
template <class Tile>
__device__ inline float4& sums_at(float4* staged, int row, int octet, int second) {
  return staged[row * (Tile::kN / 4) + second * (Tile::kN / kChunk) + (octet ^ (row / 2 % 4) ^ (second * 4))];
}
template <class Tile>
__device__ inline float& sum_at(float4* staged, int row, int feature) {
  return reinterpret_cast<float*>(&sums_at<Tile>(staged, row, feature / kChunk, feature / 4 % 2))[feature % 4];
}

template <class T, class Tile>
__device__ void store_tile(const Linear24Args& g, int64_t first_n, int64_t first_t, float4* staged,
                           const Warp<Tile>& warp, const typename Tile::Sums& sums) {
  constexpr int kOctets = Tile::kN / kChunk, kHalfT = Tile::kWarpT / 2, kRows = Tile::kT / 2;
  constexpr int kRowsAPass = Tile::kThreads / kOctets;
  static_assert(sizeof(float) * kRows * Tile::kN <= Tile::kSharedBytes, "the sums take the place of the stages");
  // A thread's eight features of a row: neighbours, stored as 16 bytes; or, where y's rows allow no vectors, kOctets
  // apart, so that what a warp stores with one instruction is contiguous.
  const bool wide = reinterpret_cast<uintptr_t>(g.y) % 16 == 0 && g.ld_y % kChunk == 0;
  const int octet = threadIdx.x % kOctets, first = wide ? octet * kChunk : octet, stride = wide ? 1 : kOctets;
  const int features = int(min(int64_t(Tile::kN), g.n - first_n));
  float bias[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const int feature = first + e * stride;
    bias[e] = g.bias && feature < features ? widen(static_cast<const T*>(g.bias)[first_n + feature]) : 0;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kHalf; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum_at<Tile>(staged, warp.t / 2 + j * kMmaT + warp.lane % 4 * 2 + e % 2,
                       warp.n + i * kMmaN + e / 2 * 8 + warp.lane / 4) = sums[i][half * Tile::kHalf + j][e];
    __syncthreads();
#pragma unroll 1
    for (int row = threadIdx.x / kOctets; row < kRows; row += kRowsAPass) {
      const int64_t t = first_t + row / kHalfT * Tile::kWarpT + half * kHalfT + row % kHalfT;
      if (t >= g.tokens) break;
      alignas(16) float z[kChunk];
      if (wide) {
        *reinterpret_cast<float4*>(z) = sums_at<Tile>(staged, row, octet, 0);
        *reinterpret_cast<float4*>(z + 4) = sums_at<Tile>(staged, row, octet, 1);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) z[e] = sum_at<Tile>(staged, row, first + e * stride);
      }
      Vector<T> y;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) y.at[e] = narrow<T>(activate24(g.activation, z[e] + bias[e]));
      T* to = static_cast<T*>(g.y) + t * g.ld_y + first_n + first;
      if (wide && first + kChunk <= features) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&y);
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
          if (first + e * stride < features) to[e * stride] = y.at[e];
      }
    }
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    linear24_sm80_kernel(Linear24Args g, int tile_rows, int tile_columns) {
  auto* stages = dynamic_shared<typename Tile::Stage>();
  const int2 tile = tile_of_block(tile_rows, tile_columns);
  const int64_t first_n = int64_t(tile.x) * Tile::kN, first_t = int64_t(tile.y) * Tile::kT;
  const Warp<Tile> warp;
  typename Tile::Sums sums = {};
  multiply_tiles<T, Tile>(g, first_n, first_t, stages, warp, sums);
  store_tile<T, Tile>(g, first_n, first_t, reinterpret_cast<float4*>(stages), warp, sums);
}

template <class Tile>
int64_t blocks_of(const Linear24Args& g) {
  return ceil_div(g.n, Tile::kN) * ceil_div(g.tokens, Tile::kT);
}

template <class T, class Tile>
cudaError_t launch_with(const Linear24Args& g, cudaStream_t stream) {
  const int64_t blocks = blocks_of<Tile>(g);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = linear24_sm80_kernel<T, Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Tile::kSharedBytes));
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(unsigned(blocks)), dim3(Tile::kThreads), Tile::kSharedBytes, stream, g,
                int(ceil_div(g.n, Tile::kN)), int(ceil_div(g.tokens, Tile::kT)));
}

}  // namespace slk::cuda::linear24_sm80
