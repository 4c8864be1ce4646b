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
#include "cuda/gemm_sm90.cuh"

namespace slk::cuda {
namespace {

using namespace gemm_sm90;

constexpr int kStages = 4;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

constexpr int kBoxes = 2;  // of C a warpgroup: one is stored while the next is written

struct __align__(1024) Shared {
  Ring<kStages> ring;
  alignas(1024) Box c[kConsumers][kBoxes];
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than a block can have");

// Sums to C, 64 columns at a time: registers -> bf16 -> swizzled box in shared memory -> TMA store.
__device__ void store_tile(const float (&sum)[kTileN / 2], Shared& shared, const CUtensorMap* c, int consumer, int row,
                           int column) {
  const bool stores = threadIdx.x % kWarpgroup == 0;
#pragma unroll
  for (int box = 0; box < kTileN / kBoxN; ++box) {
    Box& to = shared.c[consumer][box % kBoxes];
    // The store that read this box last, kBoxes stores ago, must have read it.
    if (stores) ptx::tma_store_wait_read<kBoxes - 1>();
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);
    for_box(sum, box, to, [](__nv_bfloat162& c, float2 s) { c = __floats2bfloat162_rn(s.x, s.y); });
    ptx::fence_proxy_async();  // TMA reads by the async proxy what these threads wrote by the generic one
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);
    if (stores) store_box(c, to, consumer, row, column, box);
  }
}

__device__ void consume(Shared& shared, const CUtensorMap* c, Tiles tiles, int steps, int consumer) {
  RingPosition<kStages> at;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int row, column;
    tiles.at(tile, &row, &column);
    float sum[kTileN / 2];
    multiply_tile(sum, shared.ring, at, steps, consumer, [] {});
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
    shared.ring.init();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  // Uniform over a warp, and known to the compiler as such.
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == kConsumers) {
    ptx::register_dealloc<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumers * kWarpgroup / 32 && ptx::elect_one())
      produce(shared.ring, &a, &b, tiles, steps);
  } else {
    ptx::register_alloc<kConsumerRegisters>();
    consume(shared, &c, tiles, steps, warpgroup);
  }
}

}  // namespace

cudaError_t launch_gemm_sm90(const GemmArgs& g, cudaStream_t stream) {
  if (const cudaError_t error = check_gemm_args(g); error != cudaSuccess) return error;
  if (g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.k == 0) return cudaMemset2DAsync(g.c, 2 * g.ldc, 0, 2 * g.n, g.m, stream);
  Plan p;
  if (const cudaError_t error = plan(g, gemm_sm90_kernel, sizeof(Shared), &p); error != cudaSuccess) return error;
  return launch(gemm_sm90_kernel, p.grid, kThreads, sizeof(Shared), stream, p.a, p.b, p.c, p.tiles, p.steps);
}

}  // namespace slk::cuda
