// Parts of a warp-specialised product C = A B^T for sm_90a: bf16 in, fp32 accumulation, TMA + mbarrier + wgmma. Shared
// by gemm_sm90.cu, which explains them as one kernel, and by the kernels that grow from it.
#pragma once

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

namespace slk::cuda::gemm_sm90 {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
// Rows of tiles that are walked together: the 132 tiles under way then touch about 16 x 8, the least of A and B.
constexpr int kBand = 16;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2, kConsumerRows = kTileM / kConsumers;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

// C leaves in boxes of 64 x 64.
constexpr int kBoxN = 64;
constexpr int kRowBytes = kTileK * 2, kGroupBytes = 8 * kRowBytes;  // 128, and the 8 rows that a swizzle permutes
static_assert(kRowBytes == 128 && kBoxN * 2 == 128, "rows are as wide as the swizzle");
using Box = __nv_bfloat16[kConsumerRows][kBoxN];

// The stages that the producer fills and the consumers empty.
template <int kStages>
struct __align__(1024) Ring {
  __nv_bfloat16 a[kStages][kTileM][kTileK];
  __nv_bfloat16 b[kStages][kTileN][kTileK];
  uint64_t full[kStages], empty[kStages];

  __device__ void init() {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], kConsumers * kWarpgroup / 32);
    }
  }
};

// A position in the ring: stage and the parity of the phase it is in.
template <int kStages>
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
template <int kStages>
__device__ void produce(Ring<kStages>& ring, const CUtensorMap* a, const CUtensorMap* b, Tiles tiles, int steps) {
  constexpr uint32_t kStageBytes = sizeof(ring.a[0]) + sizeof(ring.b[0]);
  RingPosition<kStages> at;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    int row, column;
    tiles.at(tile, &row, &column);
    for (int step = 0; step < steps; ++step, at.next()) {
      // On the first round the ring is empty: the phase "before the first" has the other parity and counts as over.
      ptx::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&ring.full[at.stage], kStageBytes);
      // Beyond the edges of A and B, TMA writes zeros, which add nothing; the bytes count in full.
      ptx::tma_load_2d(ring.a[at.stage], a, &ring.full[at.stage], step * kTileK, row * kTileM);
      ptx::tma_load_2d(ring.b[at.stage], b, &ring.full[at.stage], step * kTileK, column * kTileN);
    }
  }
}

// One stage: 64 columns of K in four steps of 16.
template <int kStages>
__device__ void multiply_stage(float (&sum)[kTileN / 2], const Ring<kStages>& ring, int stage, int consumer,
                               bool first) {
  const uint64_t a =
      ptx::matrix_descriptor(ring.a[stage][consumer * kConsumerRows], ptx::Swizzle::bytes128, kGroupBytes);
  const uint64_t b = ptx::matrix_descriptor(ring.b[stage], ptx::Swizzle::bytes128, kGroupBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileK; k += 16)
    ptx::wgmma_bf16<kTileN>(sum, ptx::advance(a, 2 * k), ptx::advance(b, 2 * k), !first || k > 0);
  ptx::wgmma_commit();
}

// One tile: all stages of its K, from the ring's position on; every stage is handed back when it has been read.
// meanwhile() runs while the first stage is multiplied.
template <int kStages, class F>
__device__ void multiply_tile(float (&sum)[kTileN / 2], Ring<kStages>& ring, RingPosition<kStages>& at, int steps,
                              int consumer, F meanwhile) {
  const bool speaks = threadIdx.x % 32 == 0;  // one arrival a warp
  int previous = 0;
  for (int step = 0; step < steps; ++step, at.next()) {
    ptx::mbarrier_wait(&ring.full[at.stage], at.parity);
    multiply_stage(sum, ring, at.stage, consumer, step == 0);
    if (step == 0) meanwhile();
    // This stage's products run on; those of the one before are done, and its operands may be overwritten.
    ptx::wgmma_wait<1>();
    if (step > 0 && speaks) ptx::mbarrier_arrive(&ring.empty[previous]);
    previous = at.stage;
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(sum);
  if (speaks) ptx::mbarrier_arrive(&ring.empty[previous]);
}

// f(address in the box, the sums of its two elements) for what this thread holds of 64 columns of C, rows in TMA's
// 128-byte swizzle, which also spreads a warp's 4-byte stores (8 rows, 4 lanes each) over all 32 banks.
template <class F>
__device__ void for_box(const float (&sum)[kTileN / 2], int box, Box& to, F f) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int my_row = thread / 32 * 16 + lane / 4, my_unit_byte = lane % 4 * 4;
#pragma unroll
  for (int unit = 0; unit < 8; ++unit) {  // 8 columns, 16 bytes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = my_row + 8 * half, i = (box * 8 + unit) * 4 + 2 * half;
      char* address = reinterpret_cast<char*>(&to) + r * kRowBytes + ((unit ^ r % 8) * 16) + my_unit_byte;
      f(*reinterpret_cast<__nv_bfloat162*>(address), make_float2(sum[i], sum[i + 1]));
    }
  }
}

// By one thread: box `box` of a consumer's part of tile (row, column), after fence_proxy_async and a barrier.
__device__ inline void store_box(const CUtensorMap* c, const Box& from, int consumer, int row, int column, int box) {
  ptx::tma_store_2d(c, &from, column * kTileN + box * kBoxN, row * kTileM + consumer * kConsumerRows);
  ptx::tma_store_commit();
}

inline cudaError_t encode_matrix(const void* base, int64_t rows, int64_t columns, int64_t ld, int box_rows,
                                 int box_columns, CUtensorMap* map) {
  TensorMap<2> tensor = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                         base,
                         {uint64_t(columns), uint64_t(rows)},
                         {2, uint64_t(ld) * 2},
                         {uint32_t(box_columns), uint32_t(box_rows)},
                         CU_TENSOR_MAP_SWIZZLE_128B};
  return encode(tensor, map);
}

// What a launch of a persistent kernel over g needs; g has been checked, and its sizes are not 0.
struct Plan {
  CUtensorMap a, b, c;
  Tiles tiles;
  int steps;
  dim3 grid;
};
template <class Kernel>
cudaError_t plan(const GemmArgs& g, Kernel kernel, size_t shared_bytes, Plan* p) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  if (g.m >= kLimit || g.n >= kLimit || g.k >= kLimit) return cudaErrorInvalidValue;  // TMA's coordinates
  p->tiles = {int(ceil_div(g.m, kTileM)), int(ceil_div(g.n, kTileN))};
  const int64_t count = int64_t(p->tiles.rows) * p->tiles.columns;
  if (count >= kLimit) return cudaErrorInvalidValue;
  p->steps = int(ceil_div(g.k, kTileK));

  cudaError_t error = encode_matrix(g.a, g.m, g.k, g.lda, kTileM, kTileK, &p->a);
  if (error == cudaSuccess) error = encode_matrix(g.b, g.n, g.k, g.ldb, kTileN, kTileK, &p->b);
  if (error == cudaSuccess) error = encode_matrix(g.c, g.m, g.n, g.ldc, kConsumerRows, kBoxN, &p->c);
  int device = 0, multiprocessors = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)  // more than 48 KB must be asked for; on every launch, because it is set device by device
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  p->grid = dim3(unsigned(count < multiprocessors ? count : multiprocessors));
  return error;
}

}  // namespace slk::cuda::gemm_sm90
