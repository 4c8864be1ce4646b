// C[m, n] = A[m, k] B[n, k]^T for sm_90a: bf16 in and out, fp32 accumulation, TMA + mbarrier + wgmma.
//
// Contract: slkernels/gemm.h; sizes below 2^31 (TMA's coordinates), or cudaErrorInvalidValue. The 16-byte alignment
// asked for there is TMA's. An element of C is one chain of sums over k, 16 at a time, ascending, whatever the grid.
//
// One persistent block a multiprocessor walks over tiles of C, 128 x 256 each. Its twelve warps have two roles:
//
//   producer (1 warpgroup, of which one thread works): for every tile and every 64 columns of K, waits until a stage of
//     the ring is empty, and has TMA fill it with A[128, 64] and B[256, 64]
//   consumers (2 warpgroups, 64 rows of the tile each): wait until a stage is full, multiply it on the tensor cores,
//     and say that it is empty; after the last stage of a tile, convert the sums and send them to C
//
//          empty[s]: 8 consumer warps arrive                        full[s]: 1 arrival + the stage's bytes
//   producer  --- wait empty, expect bytes, TMA A and B --->  stage s  --- wait full, wgmma, arrive empty ---> consumer
//
// The producer runs ahead through the ring, also into the next tile while the consumers are still storing this one.
//
// Why these sizes:
//   128 x 256  the 128 * 256 * 64 multiply-adds of a stage take the tensor cores 1024 cycles (2048 a cycle in bf16),
//              for which 48 KB come from L2: 48 bytes a cycle, where 128 x 128 would ask for 64. wgmma reads both
//              operands from shared memory: two of 64 x 256 x 16 read 20 KB in 256 cycles, 80 of its 128 bytes a
//              cycle. The sums, 64 x 256 a warpgroup, are 128 registers a thread.
//   64         columns of K: a row is the 128 bytes of TMA's and wgmma's widest swizzle, free of bank conflicts.
//   4 stages   192 KB, with 32 KB left to stage C: all that a block can have. Three of them in flight give a load about
//              3000 cycles to arrive.
//   registers  65536 / 384 = 168 a thread at launch, few for 128 sums and what addresses them: the producer gives most
//              of its own back (40 stay) and the consumers take 232: 128 * 40 + 256 * 232 = 64512.
#include <cuda_bf16.h>

#include "slkernels/gemm.h"
#include "slkernels/launch.cuh"
#include "slkernels/ptx/fence.h"
#include "slkernels/ptx/mbarrier.h"
#include "slkernels/ptx/tma.h"
#include "slkernels/ptx/warp.h"
#include "slkernels/ptx/wgmma.h"
#include "slkernels/tensor_map.h"
#include "slkernels/types.h"

namespace slk::cuda {
namespace {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kStages = 4;
// Rows of tiles that are walked together: the 132 tiles under way then touch about 16 x 8, the least of A and B.
constexpr int kBand = 16;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2, kConsumerRows = kTileM / kConsumers;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

// C leaves in boxes of 64 x 64, two a warpgroup: one is stored while the next is written.
constexpr int kBoxN = 64, kBoxes = 2;
constexpr int kRowBytes = kTileK * 2, kGroupBytes = 8 * kRowBytes;  // 128, and the 8 rows that a swizzle permutes
static_assert(kRowBytes == 128 && kBoxN * 2 == 128, "rows are as wide as the swizzle");

struct __align__(1024) Shared {
  __nv_bfloat16 a[kStages][kTileM][kTileK];
  __nv_bfloat16 b[kStages][kTileN][kTileK];
  __nv_bfloat16 c[kConsumers][kBoxes][kConsumerRows][kBoxN];
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than a block can have");

// A position in the ring: stage and the parity of the phase it is in.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Tiles {
  int rows, columns;  // of tiles
  __device__ int count() const { return rows * columns; }
  // Down a band of kBand rows of tiles, then to the next column: blocks that run together share rows of A and B in L2.
  __device__ void at(int index, int* row, int* column) const {
    const int band = index / (kBand * columns), in_band = index % (kBand * columns);
    const int height = rows - band * kBand < kBand ? rows - band * kBand : kBand;
    *row = band * kBand + in_band % height;
    *column = in_band / height;
  }
};

// Runs in one thread.
__device__ void produce(Shared& shared, const CUtensorMap* a, const CUtensorMap* b, Tiles tiles, int steps) {
  constexpr uint32_t kStageBytes = sizeof(shared.a[0]) + sizeof(shared.b[0]);
  RingPosition at;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int row, column;
    tiles.at(tile, &row, &column);
    for (int step = 0; step < steps; ++step, at.next()) {
      // On the first round the ring is empty: the phase "before the first" has the other parity and counts as over.
      ptx::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&shared.full[at.stage], kStageBytes);
      // Beyond the edges of A and B, TMA writes zeros, which add nothing; the bytes count in full.
      ptx::tma_load_2d(shared.a[at.stage], a, &shared.full[at.stage], step * kTileK, row * kTileM);
      ptx::tma_load_2d(shared.b[at.stage], b, &shared.full[at.stage], step * kTileK, column * kTileN);
    }
  }
}

// One stage: 64 columns of K in four steps of 16.
__device__ void multiply_stage(float (&sum)[kTileN / 2], const Shared& shared, int stage, int consumer, bool first) {
  const uint64_t a =
      ptx::matrix_descriptor(shared.a[stage][consumer * kConsumerRows], ptx::Swizzle::bytes128, kGroupBytes);
  const uint64_t b = ptx::matrix_descriptor(shared.b[stage], ptx::Swizzle::bytes128, kGroupBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileK; k += 16)
    ptx::wgmma_bf16<kTileN>(sum, ptx::advance(a, 2 * k), ptx::advance(b, 2 * k), !first || k > 0);
  ptx::wgmma_commit();
}

// Sums to C, 64 columns at a time: registers -> bf16 -> swizzled box in shared memory -> TMA store. The swizzle is the
// tensor map's; written by hand it also spreads a warp's 4-byte stores (8 rows, 4 lanes each) over all 32 banks.
__device__ void store_tile(const float (&sum)[kTileN / 2], Shared& shared, const CUtensorMap* c, int consumer, int row,
                           int column) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int my_row = thread / 32 * 16 + lane / 4, my_unit_byte = lane % 4 * 4;
#pragma unroll
  for (int box = 0; box < kTileN / kBoxN; ++box) {
    char* to = reinterpret_cast<char*>(shared.c[consumer][box % kBoxes]);
    // The store that read this box last, kBoxes stores ago, must have read it.
    if (thread == 0) ptx::tma_store_wait_read<kBoxes - 1>();
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);
#pragma unroll
    for (int unit = 0; unit < 8; ++unit) {  // 8 columns, 16 bytes
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = my_row + 8 * half, i = (box * 8 + unit) * 4 + 2 * half;
        *reinterpret_cast<__nv_bfloat162*>(to + r * kRowBytes + ((unit ^ r % 8) * 16) + my_unit_byte) =
            __floats2bfloat162_rn(sum[i], sum[i + 1]);
      }
    }
    ptx::fence_proxy_async();  // TMA reads by the async proxy what these threads wrote by the generic one
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);
    if (thread == 0) {
      ptx::tma_store_2d(c, to, column * kTileN + box * kBoxN, row * kTileM + consumer * kConsumerRows);
      ptx::tma_store_commit();
    }
  }
}

__device__ void consume(Shared& shared, const CUtensorMap* c, Tiles tiles, int steps, int consumer) {
  const bool speaks = threadIdx.x % 32 == 0;  // one arrival a warp
  RingPosition at;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int row, column;
    tiles.at(tile, &row, &column);
    float sum[kTileN / 2];
    int previous = 0;
    for (int step = 0; step < steps; ++step, at.next()) {
      ptx::mbarrier_wait(&shared.full[at.stage], at.parity);
      multiply_stage(sum, shared, at.stage, consumer, step == 0);
      // This stage's products run on; those of the one before are done, and its operands may be overwritten.
      ptx::wgmma_wait<1>();
      if (step > 0 && speaks) ptx::mbarrier_arrive(&shared.empty[previous]);
      previous = at.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(sum);
    if (speaks) ptx::mbarrier_arrive(&shared.empty[previous]);
    store_tile(sum, shared, c, consumer, row, column);
  }
  // Shared memory goes with the block: the last stores must have read it.
  if (threadIdx.x % kWarpgroup == 0) ptx::tma_store_wait_read<0>();
}

__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                     const __grid_constant__ CUtensorMap c, Tiles tiles, int steps) {
  Shared& shared = *dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&a);
    ptx::tma_prefetch(&b);
    ptx::tma_prefetch(&c);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.full[s], 1);
      ptx::mbarrier_init(&shared.empty[s], kConsumers * kWarpgroup / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  // Uniform over a warp, and known to the compiler as such.
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == kConsumers) {
    ptx::register_dealloc<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumers * kWarpgroup / 32 && ptx::elect_one()) produce(shared, &a, &b, tiles, steps);
  } else {
    ptx::register_alloc<kConsumerRegisters>();
    consume(shared, &c, tiles, steps, warpgroup);
  }
}

cudaError_t encode_matrix(const void* base, int64_t rows, int64_t columns, int64_t ld, int box_rows, int box_columns,
                          CUtensorMap* map) {
  TensorMap<2> tensor = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                         base,
                         {uint64_t(columns), uint64_t(rows)},
                         {2, uint64_t(ld) * 2},
                         {uint32_t(box_columns), uint32_t(box_rows)},
                         CU_TENSOR_MAP_SWIZZLE_128B};
  return encode(tensor, map);
}

}  // namespace

cudaError_t launch_gemm_sm90(const GemmArgs& args, cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  cudaError_t error = check_gemm_args(args);
  if (error != cudaSuccess) return error;
  if (args.m >= kLimit || args.n >= kLimit || args.k >= kLimit) return cudaErrorInvalidValue;
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (args.k == 0) return cudaMemset2DAsync(args.c, 2 * args.ldc, 0, 2 * args.n, args.m, stream);
  const Tiles tiles = {int(ceil_div(args.m, kTileM)), int(ceil_div(args.n, kTileN))};
  if (int64_t(tiles.rows) * tiles.columns >= kLimit) return cudaErrorInvalidValue;

  CUtensorMap a, b, c;
  error = encode_matrix(args.a, args.m, args.k, args.lda, kTileM, kTileK, &a);
  if (error == cudaSuccess) error = encode_matrix(args.b, args.n, args.k, args.ldb, kTileN, kTileK, &b);
  if (error == cudaSuccess) error = encode_matrix(args.c, args.m, args.n, args.ldc, kConsumerRows, kBoxN, &c);
  if (error != cudaSuccess) return error;

  int device, multiprocessors;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)  // more than 48 KB must be asked for; on every launch, because it is set device by device
    error = cudaFuncSetAttribute(gemm_sm90_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
  if (error != cudaSuccess) return error;
  const int64_t count = int64_t(tiles.rows) * tiles.columns;
  const dim3 grid(unsigned(count < multiprocessors ? count : multiprocessors));
  return launch(gemm_sm90_kernel, grid, kThreads, sizeof(Shared), stream, a, b, c, tiles,
                int(ceil_div(args.k, kTileK)));
}

}  // namespace slk::cuda
