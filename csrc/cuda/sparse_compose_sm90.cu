// W = alpha B A + S in one pass for sm_90a, bf16: the warp-specialised product of gemm_sm90.cu with a third role.
//
//   producer   as there, but into three stages
//   builders   (3 warps beside the producer): clear a tile of W in shared memory and put S's entries in their places,
//              while the consumers multiply
//   consumers  as there; then add their sums to what they find in the tile, and send it
//
//          full/empty[s]: the ring, as in gemm_sm90.cu
//          built: 3 builder warps arrive                         sent: 2 consumers arrive
//   builders  --- wait sent, clear, put S --->  tile of W  --- wait built, add, TMA store, wait read ---> consumers
//
// S's entries wait long for memory and need no tensor core: their reads hide behind the product, 16 stages of 1024
// cycles at r = 1024, as long as a builder's turn is shorter. By count, for 128 x 256 and 5 %: 43 16-byte stores a
// thread to clear, 9 dependent reads to find the rows' ranges (three searches a thread side by side), 43 rows a warp, 8
// at a time: 6 round trips. About 10000 cycles of the 16000.
//
// Sizes that differ from gemm_sm90.cu: the tile of W takes 64 KB, which leaves room for three stages (144 KB), two of
// them in flight: 2000 cycles for a load. The builders need registers: 64 a thread, and 224 for the consumers.
#include "cuda/gemm_sm90.cuh"
#include "cuda/sparse_rows.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

using namespace gemm_sm90;

constexpr int kStages = 3;
constexpr int kProducerRegisters = 64, kConsumerRegisters = 224;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

constexpr int kBoxes = kTileN / kBoxN;
constexpr int kBuilderWarps = kWarpgroup / 32 - 1, kBuilders = 32 * kBuilderWarps;
constexpr int kBuilderBarrier = 1 + kConsumers;  // a named barrier of the builders' own
constexpr int kRowsAtOnce = 8;

struct __align__(1024) Shared {
  Ring<kStages> ring;
  alignas(1024) Box w[kConsumers][kBoxes];
  int begin[kTileM], end[kTileM];  // entries of S of each row of the tile
  uint64_t built, sent;
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than a block can have");

template <class Col>
struct Sparse {
  const int32_t* crow;
  const Col* col;
  const __nv_bfloat16* values;
  int64_t n;
};

// Entries of S in each row of the tile; the searches of a thread run side by side.
template <class Col>
__device__ void find_rows(Shared& shared, const Sparse<Col>& s, int64_t first_row, int64_t first_column, int builder) {
  constexpr int kSearches = (2 * kTileM + kBuilders - 1) / kBuilders;
  int low[kSearches], high[kSearches];
#pragma unroll
  for (int u = 0; u < kSearches; ++u) {
    const int at = builder + u * kBuilders;
    const int64_t i = first_row + at % kTileM;
    const bool real = at < 2 * kTileM && i < s.n;
    low[u] = real ? s.crow[i] : 0;
    high[u] = real ? s.crow[i + 1] : 0;
  }
  for (bool more = true; more;) {
    more = false;
#pragma unroll
    for (int u = 0; u < kSearches; ++u) {
      if (low[u] >= high[u]) continue;
      const int64_t column = first_column + (builder + u * kBuilders >= kTileM ? kTileN : 0);
      const int middle = low[u] + (high[u] - low[u]) / 2;
      if (int64_t(s.col[middle]) < column)
        low[u] = middle + 1;
      else
        high[u] = middle;
      more = more || low[u] < high[u];
    }
  }
#pragma unroll
  for (int u = 0; u < kSearches; ++u) {
    const int at = builder + u * kBuilders;
    if (at < kTileM)
      shared.begin[at] = low[u];
    else if (at < 2 * kTileM)
      shared.end[at - kTileM] = low[u];
  }
}

template <class Col>
__device__ void build(Shared& shared, const Sparse<Col>& s, Tiles tiles) {
  const int builder = threadIdx.x % kWarpgroup - 32, warp = builder / 32;
  constexpr int kRows = (kTileM + kBuilderWarps - 1) / kBuilderWarps;  // of a warp
  const int first = warp * kRows, rows = first + kRows <= kTileM ? kRows : kTileM - first;
  uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x, parity ^= 1) {
    int row, column;
    tiles.at(tile, &row, &column);
    ptx::mbarrier_wait(&shared.sent, parity ^ 1);  // nothing was sent before the first tile
    auto* chunks = reinterpret_cast<uint4*>(shared.w);
    for (int at = builder; at < int(sizeof(shared.w) / sizeof(uint4)); at += kBuilders)
      chunks[at] = make_uint4(0, 0, 0, 0);
    find_rows(shared, s, int64_t(row) * kTileM, int64_t(column) * kTileN, builder);
    ptx::named_barrier_sync(kBuilderBarrier, kBuilders);
    for_entries<kRowsAtOnce>(s.col, s.values, shared.begin, shared.end, first, rows, int64_t(column) * kTileN,
                             [&](int r, int c, __nv_bfloat16 value) {
                               Box& box = shared.w[r / kConsumerRows][c / kBoxN];
                               const int in_box = r % kConsumerRows, unit = c % kBoxN / 8;
                               box[in_box][(unit ^ in_box % 8) * 8 + c % 8] = value;
                             });
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.built);
  }
}

__device__ void consume(Shared& shared, const CUtensorMap* c, Tiles tiles, int steps, int consumer, float alpha) {
  const bool stores = threadIdx.x % kWarpgroup == 0;
  RingPosition<kStages> at;
  uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x, parity ^= 1) {
    int row, column;
    tiles.at(tile, &row, &column);
    float sum[kTileN / 2];
    const bool first = tile == int(blockIdx.x);
    multiply_tile(sum, shared.ring, at, steps, consumer, [&] {
      if (!stores || first) return;
      ptx::tma_store_wait_read<0>();  // of the tile before; by now long done
      ptx::mbarrier_arrive(&shared.sent);
    });
    ptx::mbarrier_wait(&shared.built, parity);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      Box& to = shared.w[consumer][box];
      for_box(sum, box, to, [&](__nv_bfloat162& w, float2 s) {
        const float2 sparse = __bfloat1622float2(w);
        w = __floats2bfloat162_rn(fmaf(alpha, s.x, sparse.x), fmaf(alpha, s.y, sparse.y));
      });
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(1 + consumer, kWarpgroup);
      if (stores) store_box(c, to, consumer, row, column, box);
    }
  }
  if (stores) ptx::tma_store_wait_read<0>();
}

template <class Col>
__global__ void __launch_bounds__(kThreads, 1)
    compose_sm90_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                        const __grid_constant__ CUtensorMap c, Tiles tiles, int steps, Sparse<Col> s, float alpha) {
  Shared& shared = *dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&a);
    ptx::tma_prefetch(&b);
    ptx::tma_prefetch(&c);
    shared.ring.init();
    ptx::mbarrier_init(&shared.built, kBuilderWarps);
    ptx::mbarrier_init(&shared.sent, kConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == kConsumers) {
    ptx::register_dealloc<kProducerRegisters>();
    if (threadIdx.x / 32 > kConsumers * kWarpgroup / 32)
      build(shared, s, tiles);
    else if (ptx::elect_one())
      produce(shared.ring, &a, &b, tiles, steps);
  } else {
    ptx::register_alloc<kConsumerRegisters>();
    consume(shared, &c, tiles, steps, warpgroup, alpha);
  }
}

}  // namespace

cudaError_t launch_compose_sm90(const GemmArgs& g, const Csr& s, const void* values, float alpha, cudaStream_t stream) {
  if (const cudaError_t error = check_gemm_args(g); error != cudaSuccess) return error;
  if (g.m != s.n || g.n != s.m || g.k == 0) return cudaErrorInvalidValue;
  if (g.m == 0 || g.n == 0) return cudaSuccess;
  const auto run = [&](auto* col) {
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    const auto kernel = compose_sm90_kernel<Col>;
    Plan p;
    if (const cudaError_t error = plan(g, kernel, sizeof(Shared), &p); error != cudaSuccess) return error;
    const Sparse<Col> sparse = {s.crow, col, static_cast<const __nv_bfloat16*>(values), s.n};
    return launch(kernel, p.grid, kThreads, sizeof(Shared), stream, p.a, p.b, p.c, p.tiles, p.steps, sparse, alpha);
  };
  return s.col_is_16 ? run(static_cast<const int16_t*>(s.col)) : run(static_cast<const int32_t*>(s.col));
}

}  // namespace slk::cuda
