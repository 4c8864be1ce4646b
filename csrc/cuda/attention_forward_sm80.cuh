// Attention over a list of tiles, forward, for sm_80 and newer. Contract: slkernels/attention.h. The algorithm is
// FlashAttention-2's (Dao 2023, algorithm 1): a block of queries stays, tiles of keys pass by, the softmax is rescaled
// as they come.
//
// A block of four warps owns 64 or 128 rows (Stripes); each warp 16 or 32 of them, with their sums, maxima and
// outputs in registers. Its keys come by the list: kKeys at a time, a whole fraction of an entry. Data flow:
//
//   K and V tiles, in turn --cp.async--> ring of 3 slots --ldmatrix--> mma.sync
//
//   S = Q K_t^T      |  V_t is under way, and K_(t+1) into the slot that V_(t-1) has left
//   softmax          |  the same
//   O += P V_t       |  K_(t+1) is under way, and V_(t+1) into the slot that K_t has left
//
// Two barriers a tile: before S (K_t is here, V_(t-1) is read) and before O (V_t is here, K_t is read). What to mask is
// one uniform branch a tile: a FULL entry inside the sequence runs no instruction of the predicate.
//
// Why these sizes:
//   32 rows a warp   a 16 x 8 piece of K feeds two mma: 64 bytes of shared memory a cycle of the tensor cores, of 128.
//                    With Dv > 128 the outputs fit 16 rows only.
//   3 slots          with 64 keys of 128, 48 KB beside the 32 KB of Q: two blocks on an A100's multiprocessor, whose
//                    softmax and products overlap; one on sm_86. Four slots would leave room for one.
//   64, 32 keys      S takes 64 registers beside the 128 of O; wider heads halve the keys to stay within 99 KB, and
//                    softcap halves them from 96 on, to have registers for its exponentials.
#pragma once

#include "cuda/attention_rows_sm80.cuh"

namespace slk::cuda {

template <int kDk_, int kDv_, bool kPlain_>
struct ForwardTile {
  static constexpr bool kPlain = kPlain_;  // no softcap, scale > 0
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kMT = kDv <= 128 ? 2 : 1, kRows = kWarps * 16 * kMT;
  static constexpr int kKeys = kDk <= (kPlain ? 128 : 64) ? 64 : 32;
  static constexpr int kSlots = 3, kSlotChunks = kKeys * (kDk > kDv ? kDk : kDv) / 8;
  static constexpr int kQueryChunks = kRows * kDk / 8;
  static constexpr int kSharedBytes = 16 * (kQueryChunks + kSlots * kSlotChunks) + sizeof(RowTask<kKeys>);
  static_assert(kSharedBytes <= kMaxShared);
  static_assert(kDv <= kDk, "O leaves through the rows of Q");
};

struct ForwardParams {
  AttentionForward f;
  Stripes stripes;
  Scores scores;
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads) attention_forward_sm80_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kMT = Tile::kMT, kKeys = Tile::kKeys, kDk = Tile::kDk, kDv = Tile::kDv;
  const AttentionForward& f = p.f;
  const BlockRows& m = f.mask;
  uint4* q_tile = dynamic_shared<uint4>();
  uint4* ring = q_tile + Tile::kQueryChunks;
  auto& task = *reinterpret_cast<RowTask<kKeys>*>(ring + Tile::kSlots * Tile::kSlotChunks);
  if (threadIdx.x == 0) new (&task) RowTask<kKeys>(f, p.stripes, blockIdx.x);
  __syncthreads();
  const TileRows& rows = task.rows;
  const KeyTiles<kKeys>& tiles = task.tiles;
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16 * kMT;

  const auto load = [&](int slot, const void* base, const HeadStrides& strides, auto width, int64_t d, int tile,
                        int start) {
    const T* from = at_head<T>(base, strides, rows.b, rows.kv_head);
    copy_rows<kKeys, decltype(width)::value>(ring + slot * Tile::kSlotChunks, from, d, [&](int r) {
      const int key = tiles.key(m, tile, start, r);
      return key < 0 ? int64_t(-1) : key * strides.token;
    });
  };
  const auto load_k = [&](int slot, int tile, int start) {
    load(slot, f.k, f.k_strides, std::integral_constant<int, kDk>(), f.shape.dk, tile, start);
    ptx::commit_group();
  };
  const auto load_v = [&](int slot, int tile, int start) {
    load(slot, f.v, f.v_strides, std::integral_constant<int, kDv>(), f.shape.dv, tile, start);
    ptx::commit_group();
  };

  float o[kMT][kDv / 8][4] = {};
  Softmax<kMT> state;

  if (tiles.count > 0) {
    const T* q = at_head<T>(f.q, f.q_strides, rows.b, 0);
    copy_rows<Tile::kRows, kDk>(q_tile, q, f.shape.dk, [&](int r) {
      return rows.holds(r) ? rows.head_of(r) * f.q_strides.head + rows.query_of(r) * f.q_strides.token : int64_t(-1);
    });

    int slot = 0;  // of K_t; V_t and K_(t+1) follow
    const auto after_slot = [](int at, int by) { return at + by < Tile::kSlots ? at + by : at + by - Tile::kSlots; };
    int start = tiles.start(m, 0), next = tiles.start(m, 1);
    load_k(0, 0, start);
    load_v(1, 0, start);
    for (int t = 0; t < tiles.count; ++t) {
      ptx::wait_group<1>();  // K_t, of this thread; V_t may be under way
      __syncthreads();       // K_t of everybody, and everybody has read V_(t-1)
      if (t + 1 < tiles.count)
        load_k(after_slot(slot, 2), t + 1, next);
      else
        ptx::commit_group();
      const int after = tiles.start(m, t + 2);  // a tile ahead of its use: the read takes as long as a product
      float s[kMT][kKeys / 8][4] = {};
      multiply_abt<T, kMT, kKeys, kDk>(s, q_tile, row, ring + slot * Tile::kSlotChunks);
      if (!Tile::kPlain) transform<kMT, kKeys>(s, p.scores);
      if (tiles.masked(t, start)) mask_scores(s, m, tiles, rows, t, start, row);
      update<kMT, kKeys>(state, s, p.scores, [&](int i, int half, float by) { rescale_row<kMT, kDv>(o, i, half, by); });
      uint32_t probabilities[kMT][kKeys / 16][4];
      pack_a<T, kMT, kKeys>(probabilities, s);

      ptx::wait_group<1>();  // V_t
      __syncthreads();       // of everybody, and everybody has read K_t
      if (t + 1 < tiles.count)
        load_v(slot, t + 1, next);
      else
        ptx::commit_group();
      multiply_ab<T, kMT, kKeys, kDv, kDv>(o, probabilities, ring + after_slot(slot, 1) * Tile::kSlotChunks);

      start = next;
      next = after;
      slot = slot == 0 ? 2 : slot - 1;  // two tiles further in the ring
    }
    ptx::wait_all();
  }

  finish<kMT>(state, p.scores, [&](int i, int half, float lse) {
    const int r = row + 16 * i + 8 * half + lane / 4;
    if (lane % 4 == 0 && rows.holds(r)) *lse_of(f, rows, r) = lse;
  });
  store_rows<T, kMT, kDv, kDk>(
      q_tile, row, o, f.shape.dv, [&](int i, int half) { return state.sum[i][half]; },
      [&](int r) -> T* {
        if (!rows.holds(r)) return nullptr;
        return static_cast<T*>(f.o) + rows.b * f.o_strides.batch + rows.head_of(r) * f.o_strides.head +
               rows.query_of(r) * f.o_strides.token;
      });
}

template <class T>
cudaError_t launch_attention_forward_sm80(const AttentionForward& f, cudaStream_t stream) {
  const Scores scores(f.shape);
  const auto launch_tile = [&](auto tile) {
    using Tile = decltype(tile);
    const ForwardParams p = {f, Stripes(f.shape, f.mask, Tile::kRows), scores};
    if (p.stripes.tiles > INT32_MAX) return cudaErrorInvalidValue;
    const auto kernel = attention_forward_sm80_kernel<T, Tile>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (error != cudaSuccess) return error;
    return launch(kernel, dim3(unsigned(p.stripes.tiles)), dim3(kThreads), Tile::kSharedBytes, stream, p);
  };
  return for_head_size(f.shape, [&](auto size) {
    constexpr int kDk = decltype(size)::kDk, kDv = decltype(size)::kDv;
    return scores.plain() ? launch_tile(ForwardTile<kDk, kDv, true>()) : launch_tile(ForwardTile<kDk, kDv, false>());
  });
}
extern template cudaError_t launch_attention_forward_sm80<__nv_bfloat16>(const AttentionForward&, cudaStream_t);
extern template cudaError_t launch_attention_forward_sm80<__half>(const AttentionForward&, cudaStream_t);

}  // namespace slk::cuda
