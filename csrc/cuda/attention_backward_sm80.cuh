// Attention over a list of tiles, backward, for sm_80 and newer. Contract: slkernels/attention.h. Deterministic,
// without atomics: three kernels, each of which owns what it writes.
//
//   delta  a warp a query: do . o - dlse
//   dk, dv a block a tile of keys: K and V stay; Q, dO, lse and delta of the queries that its column lists pass by, for
//          every head of the group
//   dq     a block a tile of queries: Q and dO stay, K and V pass by, as in the forward
//
// Scores are computed twice, once a direction: 7 products where atomics on dq would need 5. In both, the rows that stay
// are the rows of the warps' sums, 16 a warp; P and dS then go from the sums of one product to the left operand of the
// next in registers, and never through shared memory:
//
//   dk, dv:  S^T = K Q^T,  dP^T = V dO^T;  dV += P^T dO,  dK += dS^T Q        dq:  S = Q K^T,  dP = dO V^T;  dQ += dS K
//
// dS = P (dP - delta) is rounded to the dtype for its product without the factor `scale`, which the sums take at the
// end.
//
// What passes by comes through two stages, loaded while the other is multiplied: one barrier a tile. Why 32 rows a tile
// (64 where heads are 64 wide): K and V of 64 keys of 128 take 32 KB, a stage 16; two blocks share a multiprocessor's
// 164 KB, which hides what one block of four warps could not. Heads of 256 have room for one stage and two barriers,
// and their dk and dv do not fit the registers of 16 rows: each block sums half the columns.
#pragma once

#include "cuda/attention_rows_sm80.cuh"

namespace slk::cuda {

struct BackwardParams {
  AttentionBackward b;
  Scores scores;
  Stripes stripes;  // of dq's tiles
};

// A tile of queries that looks at the block's keys.
struct QueryTile {
  int head, query;  // the first; at or beyond Sq where a corrupt list names none
  int entry, part;  // part of the entry's queries
  bool partial, valid;
};

// What a block of dk and dv works on, in shared memory for the reason of RowTask, and its walk over the tiles of
// queries: head by head of the group, entry by entry of the column, kQueries at a time. One thread walks. A tile is
// described while the one before is loaded and the one before that multiplied: three descriptions. The index of an
// entry is read when the walk comes to it and used when its first tile is described, a tile later; the thread keeps it
// in between.
struct ColumnTask {
  int b, kv_head, first, block;  // first key, column of the mask
  QueryTile tiles[3];

  __device__ ColumnTask(const BackwardParams& p, int64_t key_tile, int keys) {
    const AttentionShape& s = p.b.forward.shape;
    const int64_t key_tiles = ceil_div(s.sk, keys);
    first = int(key_tile % key_tiles) * keys;
    block = first / int(p.b.forward.mask.block_n);
    kv_head = int(key_tile / key_tiles % s.heads_kv);
    b = int(key_tile / key_tiles / s.heads_kv);
    head_ = kv_head * int(s.heads_q / s.heads_kv);
    head_end_ = head_ + int(s.heads_q / s.heads_kv);
  }
  // The first index of the first head at or behind the walk's that has entries.
  __device__ int begin_head(const BackwardParams& p) {
    const BlockRows& m = p.b.forward.mask;
    for (; head_ < head_end_; ++head_) {
      const int mask_head = head_ / int(p.b.forward.shape.heads_q / m.heads);
      const Entries entries(p.b.cols, list_row(m, p.b.cols.blocks, b, mask_head, block));
      if (entries.begin == entries.end) continue;
      entry_ = entries.begin;
      full_ = entries.full;
      end_ = entries.end;
      part_ = 0;
      return p.b.cols.idx[entry_];
    }
    return 0;
  }
  // Describes the tile that the walk stands on, whose entry has this index; returns that of the next.
  __device__ int describe(const BackwardParams& p, int queries, int index, QueryTile& tile) {
    const AttentionForward& f = p.b.forward;
    tile.valid = head_ < head_end_;
    if (!tile.valid) return 0;
    tile.head = head_;
    tile.query = first_key(index, f.mask.block_m, int(f.shape.sq)) + part_ * queries;
    tile.entry = entry_;
    tile.part = part_;
    tile.partial = entry_ < full_;
    if (++part_ * queries < f.mask.block_m) return index;
    part_ = 0;
    if (++entry_ < end_) return p.b.cols.idx[entry_];
    ++head_;
    return begin_head(p);
  }

 private:
  int head_, head_end_, entry_, full_, end_, part_;
};

template <int kDk_, int kDv_>
struct BackwardTile {
  static constexpr int kDk = kDk_, kDv = kDv_;
  static constexpr int kStay = 64, kPass = kDk <= 64 ? 64 : 32;
  static constexpr int kStages = kDv <= 128 ? 2 : 1, kHalves = kDv <= 128 ? 1 : 2;
  static constexpr int kStayChunks = kStay * (kDk + kDv) / 8, kStageChunks = kPass * (kDk + kDv) / 8;
  static constexpr int kDvChunks = kPass * kDk / 8;  // where, in a stage, the tile of kDv elements a row begins
  // lse and delta of a stage.
  static constexpr int kSharedBytes =
      16 * (kStayChunks + kStages * kStageChunks) + kStages * kPass * 8 + int(sizeof(ColumnTask));
  static_assert(kSharedBytes <= kMaxShared);
  static_assert(sizeof(RowTask<kPass>) <= sizeof(ColumnTask));
};

// What a dropped row, whose lse is -inf, and the exponent of all others take: p = 2^(logit - this).
__device__ inline float lse_to_log2(float lse) {
  return lse == -SLK_INFINITY ? SLK_INFINITY : lse * kLog2e;
}

// ---- delta

constexpr int kDeltaRows = 8;  // a warp each

template <class T>
__global__ void __launch_bounds__(kDeltaRows * 32) attention_delta_kernel(const __grid_constant__ BackwardParams p) {
  const AttentionForward& f = p.b.forward;
  const int64_t row = int64_t(blockIdx.x) * kDeltaRows + threadIdx.x / 32;
  if (row >= f.shape.batch * f.shape.heads_q * f.shape.sq) return;
  const int64_t i = row % f.shape.sq, head = row / f.shape.sq % f.shape.heads_q, b = row / f.shape.sq / f.shape.heads_q;
  const auto at = [&](const void* base, const HeadStrides& s) {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(base) + b * s.batch + head * s.head + i * s.token);
  };
  const uint4 *o = at(f.o, f.o_strides), *d_o = at(p.b.d_o, p.b.d_o_strides);
  float sum = 0;
  for (int chunk = threadIdx.x % 32; chunk * 8 < f.shape.dv; chunk += 32) {
    const uint4 x = o[chunk], y = d_o[chunk];
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 a = Element<T>::unpack(xs[w]), c = Element<T>::unpack(ys[w]);
      sum += a.x * c.x + a.y * c.y;
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  const auto* dlse = static_cast<const float*>(p.b.dlse);
  if (threadIdx.x % 32 == 0) static_cast<float*>(p.b.delta)[row] = sum - (dlse ? dlse[row] : 0.f);
}

// ---- dk, dv

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads) attention_dkdv_sm80_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kKeys = Tile::kStay, kQueries = Tile::kPass, kDk = Tile::kDk, kDv = Tile::kDv;
  constexpr int kColumnsK = kDk / Tile::kHalves, kColumnsV = kDv / Tile::kHalves;
  const AttentionForward& f = p.b.forward;
  const BlockRows& m = f.mask;
  uint4* k_tile = dynamic_shared<uint4>();
  uint4* v_tile = k_tile + kKeys * kDk / 8;
  uint4* stages = v_tile + kKeys * kDv / 8;
  float* row_values = reinterpret_cast<float*>(stages + Tile::kStages * Tile::kStageChunks);  // lse, delta a stage
  auto& task = *reinterpret_cast<ColumnTask*>(row_values + Tile::kStages * 2 * kQueries);
  const int half = int(blockIdx.x) % Tile::kHalves, sk = int(f.shape.sk), sq = int(f.shape.sq);
  int index = 0;
  if (threadIdx.x == 0) {
    new (&task) ColumnTask(p, blockIdx.x / Tile::kHalves, kKeys);
    index = task.begin_head(p);
    index = task.describe(p, kQueries, index, task.tiles[0]);
    index = task.describe(p, kQueries, index, task.tiles[1]);
  }
  __syncthreads();

  const auto load_keys = [&](uint4* tile, const void* base, const HeadStrides& strides, auto width, int64_t d) {
    copy_rows<kKeys, decltype(width)::value>(tile, at_head<T>(base, strides, task.b, task.kv_head), d, [&](int r) {
      return task.first + r < sk ? (task.first + r) * strides.token : int64_t(-1);
    });
  };
  const auto load_queries = [&](int stage, const QueryTile& at) {
    uint4* tile = stages + stage * Tile::kStageChunks;
    const auto load = [&](uint4* to, const void* base, const HeadStrides& strides, auto width, int64_t d) {
      copy_rows<kQueries, decltype(width)::value>(to, at_head<T>(base, strides, task.b, at.head), d, [&](int r) {
        return at.query + r < sq ? (at.query + r) * strides.token : int64_t(-1);
      });
    };
    load(tile, f.q, f.q_strides, std::integral_constant<int, kDk>(), f.shape.dk);
    load(tile + Tile::kDvChunks, p.b.d_o, p.b.d_o_strides, std::integral_constant<int, kDv>(), f.shape.dv);
    const int r = threadIdx.x % kQueries, which = int(threadIdx.x) / kQueries;
    if (which < 2) {
      const auto* values = static_cast<const float*>(which ? p.b.delta : f.lse);
      const bool inside = at.query + r < sq;
      const int64_t from = (task.b * f.shape.heads_q + at.head) * f.shape.sq + at.query + r;
      ptx::cp_async_4(&row_values[(2 * stage + which) * kQueries + r], values + (inside ? from : 0), inside ? 4 : 0);
    }
    ptx::commit_group();
  };

  const int row = int(threadIdx.x) / 32 * 16;
  float dk[1][kColumnsK / 8][4] = {}, dv[1][kColumnsV / 8][4] = {};
  if (task.tiles[0].valid) {
    load_keys(k_tile, f.k, f.k_strides, std::integral_constant<int, kDk>(), f.shape.dk);
    load_keys(v_tile, f.v, f.v_strides, std::integral_constant<int, kDv>(), f.shape.dv);
    load_queries(0, task.tiles[0]);
  }
  int stage = 0;
  for (int t = 0; task.tiles[t % 3].valid; ++t) {
    const QueryTile &now = task.tiles[t % 3], &next = task.tiles[(t + 1) % 3];
    ptx::wait_group<0>();
    __syncthreads();  // this stage is here, and everybody has read the other
    if (threadIdx.x == 0) index = task.describe(p, kQueries, index, task.tiles[(t + 2) % 3]);
    if (Tile::kStages == 2 && next.valid) load_queries(stage ^ 1, next);
    const uint4 *q_tile = stages + stage * Tile::kStageChunks, *do_tile = q_tile + Tile::kDvChunks;
    const float *lse = row_values + 2 * stage * kQueries, *delta = lse + kQueries;

    float s[1][kQueries / 8][4] = {}, ds[1][kQueries / 8][4] = {};
    multiply_abt<T, 1, kQueries, kDk>(s, k_tile, row, q_tile);
    multiply_abt<T, 1, kQueries, kDv>(ds, v_tile, row, do_tile);
    const bool partial = now.partial;
    const EntryBits bits(m, partial ? p.b.cols.bit_id : nullptr, now.entry);
    const int lane = ptx::opaque(threadIdx.x % 32), row = ptx::opaque(threadIdx.x) / 32 * 16;
    // Of the thread's first key, in the entry; the second is 8 further.
    const int bit = task.first % int(m.block_n) + row + lane / 4;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * n + 2 * (lane % 4) + e;
        const float lse_log2 = lse_to_log2(lse[r]), row_delta = delta[r];
        uint32_t keep = bits.skip ? 0 : ~0u;  // bit i: the thread's first key + i
        if (partial && now.query + r < sq) {
          const int mask_head = now.head / int(f.shape.heads_q / m.heads);
          keep &= Bounds(m, task.b, mask_head, now.query + r).word(task.first + row + lane / 4, m.sink);
          if (bits.words) keep &= bits.words[(now.part * kQueries + r) * int(m.block_n / 32) + bit / 32] >> bit % 32;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float &x = s[0][n][2 * i + e], &y = ds[0][n][2 * i + e];
          y -= row_delta;
          if (p.scores.capped) {
            x = p.scores.transform(x);
            y *= 1 - x * x;
          }
          x = keep & 1u << (8 * i) ? ptx::exp2_approx(x * p.scores.signed_to_log2 - lse_log2) : 0.f;
          y *= x;
        }
      }
    uint32_t operand[1][kQueries / 16][4];
    pack_a<T, 1, kQueries>(operand, s);
    multiply_ab<T, 1, kQueries, kDv, kColumnsV>(dv, operand, do_tile, half * kColumnsV);
    pack_a<T, 1, kQueries>(operand, ds);
    multiply_ab<T, 1, kQueries, kDk, kColumnsK>(dk, operand, q_tile, half * kColumnsK);
    if (Tile::kStages == 1) {
      __syncthreads();
      if (next.valid) load_queries(0, next);
    } else {
      stage ^= 1;
    }
  }

  const auto rows_of = [&](void* base, const HeadStrides& strides, int column) {
    T* to = static_cast<T*>(base) + task.b * strides.batch + task.kv_head * strides.head + column;
    const int first = task.first;
    return [=](int r) { return first + r < sk ? to + (first + r) * strides.token : nullptr; };
  };
  const float scale = float(f.shape.scale);
  store_rows<T, 1, kColumnsK, kDk>(
      k_tile, row, dk, f.shape.dk - half * kColumnsK, [&](int, int) { return scale; },
      rows_of(p.b.dk, p.b.dk_strides, half * kColumnsK));
  store_rows<T, 1, kColumnsV, kDv>(
      v_tile, row, dv, f.shape.dv - half * kColumnsV, [&](int, int) { return 1.f; },
      rows_of(p.b.dv, p.b.dv_strides, half * kColumnsV));
}

// ---- dq

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads) attention_dq_sm80_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kKeys = Tile::kPass, kDk = Tile::kDk, kDv = Tile::kDv;
  const AttentionForward& f = p.b.forward;
  const BlockRows& m = f.mask;
  uint4* q_tile = dynamic_shared<uint4>();
  uint4* do_tile = q_tile + Tile::kStay * kDk / 8;
  uint4* stages = do_tile + Tile::kStay * kDv / 8;
  auto& task = *reinterpret_cast<RowTask<kKeys>*>(stages + Tile::kStages * Tile::kStageChunks);
  if (threadIdx.x == 0) new (&task) RowTask<kKeys>(f, p.stripes, blockIdx.x);
  __syncthreads();
  const TileRows& rows = task.rows;
  const KeyTiles<kKeys>& tiles = task.tiles;
  const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 * 16;

  const auto load_queries = [&](uint4* tile, const void* base, const HeadStrides& strides, auto width, int64_t d) {
    copy_rows<Tile::kStay, decltype(width)::value>(tile, at_head<T>(base, strides, rows.b, 0), d, [&](int r) {
      return rows.holds(r) ? rows.head_of(r) * strides.head + rows.query_of(r) * strides.token : int64_t(-1);
    });
  };
  const auto load_keys = [&](int stage, int tile, int start) {
    uint4* to = stages + stage * Tile::kStageChunks;
    const auto load = [&](uint4* at, const void* base, const HeadStrides& strides, auto width, int64_t d) {
      copy_rows<kKeys, decltype(width)::value>(at, at_head<T>(base, strides, rows.b, rows.kv_head), d, [&](int r) {
        const int key = tiles.key(m, tile, start, r);
        return key < 0 ? int64_t(-1) : key * strides.token;
      });
    };
    load(to, f.k, f.k_strides, std::integral_constant<int, kDk>(), f.shape.dk);
    load(to + Tile::kDvChunks, f.v, f.v_strides, std::integral_constant<int, kDv>(), f.shape.dv);
    ptx::commit_group();
  };

  float dq[1][kDk / 8][4] = {};
  if (tiles.count > 0) {
    load_queries(q_tile, f.q, f.q_strides, std::integral_constant<int, kDk>(), f.shape.dk);
    load_queries(do_tile, p.b.d_o, p.b.d_o_strides, std::integral_constant<int, kDv>(), f.shape.dv);
    float lse_log2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half + lane / 4;
      const int64_t at = (rows.b * f.shape.heads_q + rows.head_of(r)) * f.shape.sq + rows.query_of(r);
      lse_log2[half] = rows.holds(r) ? lse_to_log2(static_cast<const float*>(f.lse)[at]) : SLK_INFINITY;
      delta[half] = rows.holds(r) ? static_cast<const float*>(p.b.delta)[at] : 0.f;
    }
    int start = tiles.start(m, 0), stage = 0;
    load_keys(0, 0, start);
    for (int t = 0; t < tiles.count; ++t) {
      const int next = tiles.start(m, t + 1);
      ptx::wait_group<0>();
      __syncthreads();  // this stage is here, and everybody has read the other
      if (Tile::kStages == 2 && t + 1 < tiles.count) load_keys(stage ^ 1, t + 1, next);
      const uint4 *k_tile = stages + stage * Tile::kStageChunks, *v_tile = k_tile + Tile::kDvChunks;

      float s[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {}, slope = 1;
      multiply_abt<T, 1, kKeys, kDk>(s, q_tile, row, k_tile);
      multiply_abt<T, 1, kKeys, kDv>(ds, do_tile, row, v_tile);
      float raw[1][kKeys / 8][4];
      if (!p.scores.plain()) transform<1, kKeys>(s, p.scores);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (p.scores.capped) slope = 1 - s[0][n][e] * s[0][n][e];
          raw[0][n][e] = (ds[0][n][e] - delta[e / 2]) * slope;
        }
      if (tiles.masked(t, start)) mask_scores<1, kKeys>(s, m, tiles, rows, t, start, row);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds[0][n][e] = raw[0][n][e] * ptx::exp2_approx(s[0][n][e] * p.scores.to_log2 - lse_log2[e / 2]);
      uint32_t operand[1][kKeys / 16][4];
      pack_a<T, 1, kKeys>(operand, ds);
      multiply_ab<T, 1, kKeys, kDk, kDk>(dq, operand, k_tile);
      if (Tile::kStages == 1) {
        __syncthreads();
        if (t + 1 < tiles.count) load_keys(0, t + 1, next);
      } else {
        stage ^= 1;
      }
      start = next;
    }
  }
  const float scale = float(f.shape.scale);
  store_rows<T, 1, kDk, kDk>(
      q_tile, row, dq, f.shape.dk, [&](int, int) { return scale; },
      [&](int r) -> T* {
        if (!rows.holds(r)) return nullptr;
        return static_cast<T*>(p.b.dq) + rows.b * p.b.dq_strides.batch + rows.head_of(r) * p.b.dq_strides.head +
               rows.query_of(r) * p.b.dq_strides.token;
      });
}

template <class T>
cudaError_t launch_attention_backward_sm80(const AttentionBackward& b, cudaStream_t stream) {
  const AttentionShape& shape = b.forward.shape;
  return for_head_size(shape, [&](auto size) {
    using Tile = BackwardTile<decltype(size)::kDk, decltype(size)::kDv>;
    const BackwardParams p = {b, Scores(shape), Stripes(shape, b.forward.mask, Tile::kStay)};
    const int64_t rows = shape.batch * shape.heads_q * shape.sq;
    const int64_t key_tiles = ceil_div(shape.sk, Tile::kStay) * shape.heads_kv * shape.batch * Tile::kHalves;
    if (ceil_div(rows, kDeltaRows) > INT32_MAX || key_tiles > INT32_MAX || p.stripes.tiles > INT32_MAX)
      return cudaErrorInvalidValue;
    const auto dkdv = attention_dkdv_sm80_kernel<T, Tile>;
    const auto dq = attention_dq_sm80_kernel<T, Tile>;
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaError_t error = cudaFuncSetAttribute(dkdv, attribute, Tile::kSharedBytes);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(dq, attribute, Tile::kSharedBytes);
    if (error == cudaSuccess && rows > 0)
      error = launch(attention_delta_kernel<T>, dim3(unsigned(ceil_div(rows, kDeltaRows))), dim3(kDeltaRows * 32), 0,
                     stream, p);
    if (error == cudaSuccess && b.dk && key_tiles > 0)
      error = launch(dkdv, dim3(unsigned(key_tiles)), dim3(kThreads), Tile::kSharedBytes, stream, p);
    if (error == cudaSuccess && b.dq && rows > 0)
      error = launch(dq, dim3(unsigned(p.stripes.tiles)), dim3(kThreads), Tile::kSharedBytes, stream, p);
    return error;
  });
}
extern template cudaError_t launch_attention_backward_sm80<__nv_bfloat16>(const AttentionBackward&, cudaStream_t);
extern template cudaError_t launch_attention_backward_sm80<__half>(const AttentionBackward&, cudaStream_t);

}  // namespace slk::cuda
