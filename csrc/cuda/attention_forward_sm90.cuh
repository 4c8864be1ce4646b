// Attention over a list of tiles, forward, for sm_90a: TMA + mbarrier + wgmma, warp-specialised. Contract:
// slkernels/attention.h; the pipeline is FlashAttention-3's (Shah et al. 2024, sections 3.1 and 3.2).
//
// A block of twelve warps owns 128 rows (Stripes of 64 or 128):
//
//   producer (1 warpgroup, of which one thread works): Q once; then for every tile of keys, waits until a stage is
//   empty
//     and has TMA fill it with K, and likewise with V
//   consumers (2 warpgroups, 64 rows each): S = Q K^T from shared memory; softmax in registers; O += P V with P from
//     registers and V N-major, as it lies in memory
//
//   S_t = Q K_t^T        }  issued together: the tensor cores go on with the second
//   O  += P_(t-1) V_(t-1) } while the softmax of S_t runs on the other units
//
// A tile of keys is kParts times 64 keys, each of which lies where the list says: an entry of 64 keys is a part, one of
// 128 two. TMA takes any first row, so that token offsets (unit = 1) cost nothing; what it fetches beyond the sequence
// is zeros, which the mask drops. Gathered columns do not fit TMA: such calls run the kernel of sm_80.
//
// Why these sizes:
//   128 rows     a key's K and V, 4 D bytes, then serve 128 queries: 128 FLOP a byte from L2. Masks of 64 rows fill
//   them
//                with two heads of a group, where they share the mask; else half the block works.
//   128 keys     S of a warpgroup takes 64 registers a thread beside 64 of O and 32 of P, of 240. Heads of 256, whose O
//                takes 128, see 64 keys at a time.
//   2 stages     of K and V: 128 KB and Q's 32 for heads of 128, 192 to 208 KB for wider ones: one block a
//                multiprocessor. A stage is filled during a whole tile's products.
//   registers    24 stay with the producer, the consumers take 240: 128 * 24 + 256 * 240 = 64512.
#pragma once

#include "cuda/attention_rows_sm80.cuh"
#include "slkernels/ptx/fence.h"
#include "slkernels/ptx/mbarrier.h"
#include "slkernels/ptx/tma.h"
#include "slkernels/ptx/warp.h"
#include "slkernels/ptx/wgmma.h"
#include "slkernels/tensor_map.h"

namespace slk::cuda {

constexpr int kWarpgroup = 128, kConsumers = 2, kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);
constexpr int kPart = 64;                    // keys that are contiguous; rows of a consumer
constexpr int kPanel = 64, kRowBytes = 128;  // columns of a panel: the width of the swizzle
constexpr int kStages = 2;

template <class T, int kDk_, int kDv_>
struct HopperTile {
  static constexpr int kDk = kDk_, kDv = kDv_, kParts = kDv <= 128 ? 2 : 1, kKeys = kParts * kPart;
  static constexpr int kPanelsK = kDk / kPanel, kPanelsV = kDv / kPanel;
  struct __align__(1024) Shared {
    T q[kConsumers][kPanelsK][kPart][kPanel];
    T k[kStages][kPanelsK][kKeys][kPanel], v[kStages][kPanelsV][kKeys][kPanel];
    RowTask<kPart> task;
    uint64_t q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "more than a block can have");
};

template <class T>
struct Wgmma;
template <>
struct Wgmma<__nv_bfloat16> {
  static constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  template <int N>
  __device__ static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ptx::wgmma_bf16<N>(d, a, b, accumulate);
  }
  template <int N>
  __device__ static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    ptx::wgmma_registers_bf16<N>(d, a, b, true);
  }
};
template <>
struct Wgmma<__half> {
  static constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  template <int N>
  __device__ static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ptx::wgmma_f16<N>(d, a, b, accumulate);
  }
  template <int N>
  __device__ static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    ptx::wgmma_registers_f16<N>(d, a, b, true);
  }
};

// A stage and the parity of the phase it is in.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    stage ^= 1;
    parity ^= stage == 0;
  }
};

struct HopperParams {
  AttentionForward f;
  Stripes stripes;
  Scores scores;
};

// Runs in one thread.
template <class Tile, class Shared>
__device__ void produce(Shared& shared, const BlockRows& m, const CUtensorMap* q, const CUtensorMap* k,
                        const CUtensorMap* v) {
  const TileRows& rows = shared.task.rows;
  const KeyTiles<kPart>& parts = shared.task.tiles;
  ptx::mbarrier_arrive_expect_tx(&shared.q_full, sizeof(shared.q));
  for (int consumer = 0; consumer < kConsumers; ++consumer)
    for (int panel = 0; panel < Tile::kPanelsK; ++panel) {
      // Stripes that no head fills read another head's rows, or zeros beyond the last: nobody looks at their results.
      const int row = consumer * kPart;
      ptx::tma_load_4d(shared.q[consumer][panel], q, &shared.q_full, panel * kPanel, rows.query_of(row),
                       rows.head_of(row), rows.b);
    }
  RingPosition at;
  for (int first = 0; first < parts.count; first += Tile::kParts, at.next()) {
    int start[Tile::kParts];
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) start[part] = parts.start(m, first + part);
    // On the first round the ring is empty: the phase "before the first" has the other parity and counts as over.
    ptx::mbarrier_wait(&shared.k_empty[at.stage], at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&shared.k_full[at.stage], sizeof(shared.k[0]));
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part)
      for (int panel = 0; panel < Tile::kPanelsK; ++panel)
        ptx::tma_load_4d(shared.k[at.stage][panel][part * kPart], k, &shared.k_full[at.stage], panel * kPanel,
                         start[part], rows.kv_head, rows.b);
    ptx::mbarrier_wait(&shared.v_empty[at.stage], at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&shared.v_full[at.stage], sizeof(shared.v[0]));
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part)
      for (int panel = 0; panel < Tile::kPanelsV; ++panel)
        ptx::tma_load_4d(shared.v[at.stage][panel][part * kPart], v, &shared.v_full[at.stage], panel * kPanel,
                         start[part], rows.kv_head, rows.b);
  }
}

// S = Q K^T, issued.
template <class T, class Tile, class Shared>
__device__ void issue_scores(float (&s)[Tile::kKeys / 2], const Shared& shared, int consumer, int stage) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanelsK; ++panel) {
    const uint64_t a = ptx::matrix_descriptor(shared.q[consumer][panel], ptx::Swizzle::bytes128, 8 * kRowBytes);
    const uint64_t b = ptx::matrix_descriptor(shared.k[stage][panel], ptx::Swizzle::bytes128, 8 * kRowBytes);
#pragma unroll
    for (int k = 0; k < kPanel; k += 16)
      Wgmma<T>::template shared<Tile::kKeys>(s, ptx::advance(a, 2 * k), ptx::advance(b, 2 * k), panel > 0 || k > 0);
  }
  ptx::wgmma_commit();
}
// O += P V, issued.
template <class T, class Tile, class Shared>
__device__ void issue_output(float (&o)[Tile::kDv / 2], const uint32_t (&p)[1][Tile::kKeys / 16][4],
                             const Shared& shared, int stage) {
  const uint64_t b = ptx::matrix_descriptor_n_major(shared.v[stage], 8 * kRowBytes, Tile::kKeys * kRowBytes);
#pragma unroll
  for (int step = 0; step < Tile::kKeys / 16; ++step)
    Wgmma<T>::template registers<Tile::kDv>(o, p[0][step], ptx::advance(b, step * 16 * kRowBytes));
  ptx::wgmma_commit();
}

template <class T, class Tile, class Shared>
__device__ void consume(Shared& shared, const HopperParams& params, int consumer) {
  constexpr int kKeys = Tile::kKeys, kDv = Tile::kDv;
  const AttentionForward& f = params.f;
  const BlockRows& m = f.mask;
  const TileRows& rows = shared.task.rows;
  const KeyTiles<kPart>& parts = shared.task.tiles;
  const bool speaks = threadIdx.x % 32 == 0;  // one arrival a warp

  // As mma's accumulators: [16 rows of the warp][8 columns][4].
  float o[kDv / 2] = {}, s[kKeys / 2];
  auto& o_tile = reinterpret_cast<float (&)[1][kDv / 8][4]>(o);
  auto& s_tile = reinterpret_cast<float (&)[1][kKeys / 8][4]>(s);
  uint32_t p[1][kKeys / 16][4];
  Softmax<1> state;
  float by[2];
  const auto soften = [&](int first) {  // the scores of parts first ...
    const int warp_row = consumer * kPart + ptx::opaque(threadIdx.x) % kWarpgroup / 32 * 16;
    if (!params.scores.plain()) transform<1, kKeys>(s_tile, params.scores);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const int start = parts.start(m, first + part);
      auto& scores = reinterpret_cast<float (&)[1][kPart / 8][4]>(s[part * kPart / 2]);
      if (parts.masked(first + part, start)) mask_scores(scores, m, parts, rows, first + part, start, warp_row);
    }
    update<1, kKeys>(state, s_tile, params.scores, [&](int, int half, float factor) { by[half] = factor; });
  };

  if (parts.count > 0) {
    RingPosition at, before;
    ptx::mbarrier_wait(&shared.q_full, 0);
    ptx::mbarrier_wait(&shared.k_full[0], 0);
    ptx::wgmma_fence();
    issue_scores<T, Tile>(s, shared, consumer, 0);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(s);
    if (speaks) ptx::mbarrier_arrive(&shared.k_empty[0]);
    soften(0);
    pack_a<T, 1, kKeys>(p, s_tile);
    for (int first = Tile::kParts; first < parts.count; first += Tile::kParts) {
      at.next();
      ptx::mbarrier_wait(&shared.k_full[at.stage], at.parity);
      ptx::wgmma_fence();
      issue_scores<T, Tile>(s, shared, consumer, at.stage);
      ptx::mbarrier_wait(&shared.v_full[before.stage], before.parity);
      ptx::wgmma_fence();
      issue_output<T, Tile>(o, p, shared, before.stage);
      ptx::wgmma_wait<1>();
      ptx::wgmma_settle(s);
      if (speaks) ptx::mbarrier_arrive(&shared.k_empty[at.stage]);
      soften(first);
      ptx::wgmma_wait<0>();
      ptx::wgmma_settle(o);
      if (speaks) ptx::mbarrier_arrive(&shared.v_empty[before.stage]);
      rescale_row<1, kDv>(o_tile, 0, 0, by[0]);
      rescale_row<1, kDv>(o_tile, 0, 1, by[1]);
      pack_a<T, 1, kKeys>(p, s_tile);
      before = at;
    }
    ptx::mbarrier_wait(&shared.v_full[before.stage], before.parity);
    ptx::wgmma_fence();
    issue_output<T, Tile>(o, p, shared, before.stage);
    ptx::wgmma_wait<0>();
    ptx::wgmma_settle(o);
  }

  const int lane = ptx::opaque(threadIdx.x) % 32;
  const int row = consumer * kPart + ptx::opaque(threadIdx.x) % kWarpgroup / 32 * 16;
  finish<1>(state, params.scores, [&](int, int half, float lse) {
    const int r = row + 8 * half + lane / 4;
    if (lane % 4 == 0 && rows.holds(r)) *lse_of(f, rows, r) = lse;
  });
  // O leaves through this warpgroup's Q, which all its warps have read: the rows there are the consumer's, from 0.
  ptx::mbarrier_wait(&shared.q_full, 0);
  ptx::named_barrier_sync(1 + consumer, kWarpgroup);
  store_rows<T, 1, kDv, Tile::kDk>(
      reinterpret_cast<uint4*>(shared.q[consumer]), row - consumer * kPart, o_tile, f.shape.dv,
      [&](int, int half) { return state.sum[0][half]; },
      [&](int r) -> T* {
        r += consumer * kPart;
        if (!rows.holds(r)) return nullptr;
        return static_cast<T*>(f.o) + rows.b * f.o_strides.batch + rows.head_of(r) * f.o_strides.head +
               rows.query_of(r) * f.o_strides.token;
      });
}

template <class T, class Tile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                                  const __grid_constant__ CUtensorMap v, const __grid_constant__ HopperParams p) {
  auto& shared = *dynamic_shared<typename Tile::Shared>();
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&q);
    ptx::tma_prefetch(&k);
    ptx::tma_prefetch(&v);
    ptx::mbarrier_init(&shared.q_full, 1);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.k_full[s], 1);
      ptx::mbarrier_init(&shared.v_full[s], 1);
      ptx::mbarrier_init(&shared.k_empty[s], kConsumers * kWarpgroup / 32);
      ptx::mbarrier_init(&shared.v_empty[s], kConsumers * kWarpgroup / 32);
    }
    ptx::fence_mbarrier_init();
    new (&shared.task) RowTask<kPart>(p.f, p.stripes, blockIdx.x);
  }
  __syncthreads();
  // Uniform over a warp, and known to the compiler as such.
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == kConsumers) {
    ptx::register_dealloc<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumers * kWarpgroup / 32 && ptx::elect_one())
      produce<Tile>(shared, p.f.mask, &q, &k, &v);
  } else {
    ptx::register_alloc<kConsumerRegisters>();
    consume<T, Tile>(shared, p, warpgroup);
  }
}

template <class T>
cudaError_t encode_heads(const void* base, const HeadStrides& s, int64_t d, int64_t tokens, int64_t heads,
                         int64_t batch, CUtensorMap* map) {
  const TensorMap<4> tensor = {Wgmma<T>::kMapType,
                               base,
                               {uint64_t(d), uint64_t(tokens), uint64_t(heads), uint64_t(batch)},
                               {2, uint64_t(s.token) * 2, uint64_t(s.head) * 2, uint64_t(s.batch) * 2},
                               {kPanel, kPart, 1, 1},
                               CU_TENSOR_MAP_SWIZZLE_128B};
  return encode(tensor, map);
}

template <class T, int kDk, int kDv>
cudaError_t launch_attention_forward_sm90(const AttentionForward& f, cudaStream_t stream) {
  using Tile = HopperTile<T, kDk, kDv>;
  const AttentionShape& shape = f.shape;
  const HopperParams p = {f, Stripes(shape, f.mask, kConsumers * kPart, kPart), Scores(shape)};
  if (p.stripes.tiles > INT32_MAX) return cudaErrorInvalidValue;
  CUtensorMap q, k, v;
  cudaError_t error = encode_heads<T>(f.q, f.q_strides, shape.dk, shape.sq, shape.heads_q, shape.batch, &q);
  if (error == cudaSuccess)
    error = encode_heads<T>(f.k, f.k_strides, shape.dk, shape.sk, shape.heads_kv, shape.batch, &k);
  if (error == cudaSuccess)
    error = encode_heads<T>(f.v, f.v_strides, shape.dv, shape.sk, shape.heads_kv, shape.batch, &v);
  const auto kernel = attention_forward_sm90_kernel<T, Tile>;
  constexpr int kBytes = sizeof(typename Tile::Shared);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(unsigned(p.stripes.tiles)), dim3(kBlockThreads), kBytes, stream, q, k, v, p);
}
template <class T>
cudaError_t launch_attention_forward_sm90(const AttentionForward& f, cudaStream_t stream) {
  if (f.shape.dk <= 64 && f.shape.dv <= 64) return launch_attention_forward_sm90<T, 64, 64>(f, stream);
  if (f.shape.dk <= 128 && f.shape.dv <= 128) return launch_attention_forward_sm90<T, 128, 128>(f, stream);
  if (f.shape.dk <= 192 && f.shape.dv <= 128) return launch_attention_forward_sm90<T, 192, 128>(f, stream);
  return launch_attention_forward_sm90<T, 256, 256>(f, stream);
}
extern template cudaError_t launch_attention_forward_sm90<__nv_bfloat16>(const AttentionForward&, cudaStream_t);
extern template cudaError_t launch_attention_forward_sm90<__half>(const AttentionForward&, cudaStream_t);

}  // namespace slk::cuda
