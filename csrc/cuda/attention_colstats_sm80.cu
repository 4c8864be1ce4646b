// Column sums, column maxima, diagonal sums and block sums of the softmax, without storing it, for sm_80 and newer.
// Contract: slkernels/attention.h.
//
// A block of four warps has a run of blocks of queries of one head, 64 queries at a time (16 a warp), and of each a run
// of its tiles of keys. Q stays in shared memory, tiles of K pass through two slots (cp.async), S = Q K^T comes from
// mma.sync as in the forward. Two kernels:
//
//   lse     maximum and sum of each query over the block's run of tiles; skipped where the caller knows lse
//   counts  p = 2^(logit - lse) of a tile goes to shared memory, rows a word apart from a multiple of 32: then a thread
//           adds up part of a column, or a diagonal, without bank conflicts, and into its block's own sums in memory
//
// and a third adds the blocks' sums up. No atomics: a sum's terms have one order, given by shapes.
//
// 64 keys a tile (32 from heads of 192 on): p takes 17 KB, Q and two slots 48 KB at heads of 128, three blocks a
// multiprocessor of 228 KB. Counting costs about 64 x 64 / 128 x 2 reads of shared memory a thread and tile, beside the
// product's 8 x Dk / 16 mma a warp.
#include "cuda/attention_rows_sm80.cuh"

namespace slk::cuda {
namespace {

constexpr int kRows = 64;  // queries of a tile
constexpr int kReduceThreads = 256;
constexpr int kBlocksAMultiprocessor = 3;  // at most 168 registers: for 4 or 5 blocks ptxas would spill

template <int kDk_>
struct ColStatsTile {
  static constexpr int kDk = kDk_, kKeys = kDk <= 128 ? 64 : 32;
  static constexpr int kStride = kKeys + 1;         // of p's rows: columns and diagonals on different banks
  static constexpr int kShares = kThreads / kKeys;  // threads of a column
  static constexpr int kQueryChunks = kRows * kDk / 8, kSlotChunks = kKeys * kDk / 8;
  static constexpr int kSharedBytes = 16 * (kQueryChunks + 2 * kSlotChunks) + 4 * (kRows * kStride + 2 * kThreads);
  static_assert(kSharedBytes <= kMaxShared);
  static_assert(kRows + kKeys - 1 <= kThreads, "a thread a diagonal");
};

struct ColStatsParams {
  ColStatsLaunch c;
  Scores scores;
};

// Calls body(rows, tiles, first tile, end tile) for the 64s of queries of this block's run.
template <int kKeys, class Body>
__device__ void for_each_tile_of_queries(const ColStatsLaunch& c, const Body& body) {
  const AttentionForward& f = c.stats.forward;
  const BlockRows& m = f.mask;
  const int head = int(blockIdx.y % f.shape.heads_q), b = int(blockIdx.y / f.shape.heads_q);
  const int64_t part = blockIdx.x / c.splits, split = blockIdx.x % c.splits;
  const Range queries = c.stats.queries;
  const int64_t first = queries.begin / m.block_m, blocks = (queries.end + m.block_m - 1) / m.block_m - first;
  const int64_t begin = first + blocks * part / c.stats.parts, end = first + blocks * (part + 1) / c.stats.parts;
  for (int64_t at = begin * m.block_m; at < end * m.block_m && at < queries.end; at += kRows) {
    const int64_t from = at > queries.begin ? at : queries.begin,
                  to = at + kRows < queries.end ? at + kRows : queries.end;
    if (from >= to) continue;
    const TileRows rows(f.shape, m, b, head, int(at / m.block_m), int(from), int(to));
    const KeyTiles<kKeys> tiles(m, list_row(m, m.rows.blocks, b, rows.mask_head, rows.block), f.shape.sk);
    body(rows, tiles, int(tiles.count * split / c.splits), int(tiles.count * (split + 1) / c.splits));
  }
}

// Scores of the tiles [begin, end) one after another: body(s, tile, start). Ends with a barrier after each.
template <class T, class Tile, class Body>
__device__ void for_each_scores(const ColStatsParams& p, const TileRows& rows, const KeyTiles<Tile::kKeys>& tiles,
                                int begin, int end, uint4* q_tile, const Body& body) {
  if (begin >= end) return;
  constexpr int kKeys = Tile::kKeys, kDk = Tile::kDk;
  const AttentionForward& f = p.c.stats.forward;
  uint4* slots = q_tile + Tile::kQueryChunks;
  const int row = int(threadIdx.x) / 32 * 16;
  const auto load_k = [&](int tile) {
    const int start = tiles.start(f.mask, tile);
    copy_rows<kKeys, kDk>(slots + (tile - begin) % 2 * Tile::kSlotChunks,
                          at_head<T>(f.k, f.k_strides, rows.b, rows.kv_head), f.shape.dk, [&](int r) {
                            const int key = tiles.key(f.mask, tile, start, r);
                            return key < 0 ? int64_t(-1) : key * f.k_strides.token;
                          });
    ptx::commit_group();
  };
  copy_rows<kRows, kDk>(q_tile, at_head<T>(f.q, f.q_strides, rows.b, rows.head), f.shape.dk,
                        [&](int r) { return rows.holds(r) ? rows.query_of(r) * f.q_strides.token : int64_t(-1); });
  load_k(begin);
  for (int t = begin; t < end; ++t) {
    if (t + 1 < end)
      load_k(t + 1);
    else
      ptx::commit_group();
    ptx::wait_group<1>();
    __syncthreads();
    const int start = tiles.start(f.mask, t);
    float s[1][kKeys / 8][4] = {};
    multiply_abt<T, 1, kKeys, kDk>(s, q_tile, row, slots + (t - begin) % 2 * Tile::kSlotChunks);
    if (!p.scores.plain()) transform<1, kKeys>(s, p.scores);
    if (tiles.masked(t, start)) mask_scores(s, f.mask, tiles, rows, t, start, row);
    body(s, t, start);
    __syncthreads();
  }
  ptx::wait_all();
}

__device__ int64_t query_place(const AttentionForward& f, const TileRows& rows, int row) {
  return (rows.b * f.shape.heads_q + rows.head) * f.shape.sq + rows.query_of(row);
}
__device__ int row_of_thread(int half) {
  return int(threadIdx.x) / 32 * 16 + 8 * half + int(threadIdx.x) % 32 / 4;
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor)
    attention_colstats_lse_kernel(const __grid_constant__ ColStatsParams p) {
  uint4* q_tile = dynamic_shared<uint4>();
  const int64_t split = blockIdx.x % p.c.splits;
  for_each_tile_of_queries<Tile::kKeys>(
      p.c, [&](const TileRows& rows, const KeyTiles<Tile::kKeys>& tiles, int begin, int end) {
        Softmax<1> state;
        for_each_scores<T, Tile>(p, rows, tiles, begin, end, q_tile, [&](auto& s, int, int) {
          update<1, Tile::kKeys>(state, s, p.scores, [](int, int, float) {});
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_of_thread(half);
          const float sum = row_sum(state.sum[0][half]);
          if (threadIdx.x % 4 != 0 || !rows.holds(row)) continue;
          float* to = p.c.partial_lse + 2 * (query_place(p.c.stats.forward, rows, row) * p.c.splits + split);
          to[0] = state.top[0][half] * p.scores.to_log2;
          to[1] = sum;
        }
      });
}

// lse of a row in base 2; 0 where it kept nothing, whose logits are all -inf.
__device__ float base_of(const ColStatsLaunch& c, const TileRows& rows, int row) {
  if (!rows.holds(row)) return 0;
  const int64_t place = query_place(c.stats.forward, rows, row);
  if (!c.partial_lse) {
    const float lse = static_cast<const float*>(c.stats.forward.lse)[place];
    return lse == -SLK_INFINITY ? 0.f : lse * kLog2e;
  }
  const float* parts = c.partial_lse + 2 * place * c.splits;
  float top = -SLK_INFINITY, sum = 0;
  for (int64_t i = 0; i < c.splits; ++i) top = fmaxf(top, parts[2 * i]);
  if (top == -SLK_INFINITY) return 0;
  for (int64_t i = 0; i < c.splits; ++i) sum += parts[2 * i + 1] * ptx::exp2_approx(parts[2 * i] - top);
  return top + log2f(sum);
}

// The block's own sums.
struct Counts {
  float *sum, *max;  // [Sk]
  float* diagonal;   // [Sk + Sq - 1], at distance 0 from query 0 and key 0
  float* block_sum;  // of the queries' block
  int64_t sk, block_n;
};

// Adds the columns' sums of a tile up to blocks; one warp. `sum(column)` is the tile's, `key(column)` negative for
// none.
template <int kKeys, class Sum, class Key>
__device__ void count_blocks(const Counts& to, bool listed, int start, const Sum& sum, const Key& key) {
  const int lane = threadIdx.x % 32;
  if (!listed) {  // keys anywhere: few, and seldom
    for (int c = 0; lane == 0 && c < kKeys; ++c)
      if (key(c) >= 0) to.block_sum[key(c) / to.block_n] += sum(c);
    return;
  }
  // kKeys neighbours are in one block or two.
  const int64_t block = start / to.block_n;
  float here = 0, after = 0;
#pragma unroll
  for (int c = lane; c < kKeys; c += 32) (start + c < (block + 1) * to.block_n ? here : after) += sum(c);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    here += __shfl_xor_sync(0xffffffffu, here, step);
    after += __shfl_xor_sync(0xffffffffu, after, step);
  }
  if (lane != 0 || start >= to.sk) return;
  to.block_sum[block] += here;
  if ((block + 1) * to.block_n < to.sk) to.block_sum[block + 1] += after;
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kBlocksAMultiprocessor)
    attention_colstats_kernel(const __grid_constant__ ColStatsParams p) {
  constexpr int kKeys = Tile::kKeys, kStride = Tile::kStride, kShares = Tile::kShares;
  const AttentionColStats& c = p.c.stats;
  const AttentionForward& f = c.forward;
  uint4* q_tile = dynamic_shared<uint4>();
  float* probabilities = reinterpret_cast<float*>(q_tile + Tile::kQueryChunks + 2 * Tile::kSlotChunks);
  float *share_sum = probabilities + kRows * kStride, *share_max = share_sum + kThreads;
  const int64_t place = blockIdx.y * c.parts * p.c.splits + blockIdx.x, split = blockIdx.x % p.c.splits;
  const int64_t key_blocks = (f.shape.sk + f.mask.block_n - 1) / f.mask.block_n;
  const int thread = threadIdx.x;

  for_each_tile_of_queries<kKeys>(p.c, [&](const TileRows& rows, const KeyTiles<kKeys>& tiles, int begin, int end) {
    const float base[2] = {base_of(p.c, rows, row_of_thread(0)), base_of(p.c, rows, row_of_thread(1))};
    const int64_t block_row = (blockIdx.y * p.c.splits + split) * f.mask.rows.blocks + rows.block;
    const int64_t origin = f.shape.sq - 1 - rows.first;  // of the diagonals: (row 0, key 0)
    const Counts to = {c.col_sum + place * f.shape.sk,
                       c.col_max + place * f.shape.sk,
                       c.diagonal + place * (f.shape.sk + f.shape.sq - 1),
                       c.block_sum + block_row * key_blocks,
                       f.shape.sk,
                       f.mask.block_n};
    for_each_scores<T, Tile>(p, rows, tiles, begin, end, q_tile, [&](auto& s, int t, int start) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_thread(half);
        const bool held = rows.holds(row);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float logit = s[0][n][2 * half + e] * p.scores.to_log2;
            probabilities[row * kStride + 8 * n + thread % 4 * 2 + e] =
                held ? ptx::exp2_approx(logit - base[half]) : 0.f;
          }
      }
      __syncthreads();
      const int column = thread % kKeys, share = thread / kKeys;
      float sum = 0, top = 0;
      for (int i = share * kRows / kShares; i < (share + 1) * kRows / kShares; ++i) {
        const float x = probabilities[i * kStride + column];
        sum += x;
        top = fmaxf(top, x);
      }
      share_sum[thread] = sum;
      share_max[thread] = top;
      const bool listed = t < tiles.listed;
      const auto key_of = [&](int at) { return tiles.key(f.mask, t, start, at); };
      if (listed) {
        const int across = thread - (kRows - 1);  // column - row
        float total = 0;
        for (int i = across < 0 ? -across : 0; i < kRows && i + across < kKeys; ++i)
          total += probabilities[i * kStride + i + across];
        const int64_t at = origin + start + across;
        if (thread < kRows + kKeys - 1 && at >= 0 && at < f.shape.sk + f.shape.sq - 1) to.diagonal[at] += total;
      } else {
        // The keys of a row are different ones, and so are their diagonals; those of two rows may meet.
        for (int i = 0; i < kRows; ++i) {
          if (thread < kKeys && key_of(thread) >= 0 && rows.holds(i))
            to.diagonal[origin + key_of(thread) - i] += probabilities[i * kStride + thread];
          __syncthreads();
        }
      }
      __syncthreads();
      const auto column_sum = [&](int at) {
        float total = 0;
#pragma unroll
        for (int i = 0; i < kShares; ++i) total += share_sum[i * kKeys + at];
        return total;
      };
      if (thread < kKeys && key_of(thread) >= 0) {
        float most = 0;
#pragma unroll
        for (int i = 0; i < kShares; ++i) most = fmaxf(most, share_max[i * kKeys + thread]);
        const int key = key_of(thread);
        to.sum[key] += column_sum(thread);
        to.max[key] = fmaxf(to.max[key], most);
      }
      if (thread >= kThreads - 32) count_blocks<kKeys>(to, listed, start, column_sum, key_of);
    });
  });
}

// A thread a key: the sums over the runs, in their order. The threads beyond take the blocks' sums.
__global__ void __launch_bounds__(kReduceThreads)
    attention_colstats_reduce_kernel(const __grid_constant__ ColStatsLaunch c) {
  const AttentionShape& s = c.stats.forward.shape;
  const int64_t runs = c.stats.parts * c.splits, head = blockIdx.y, distances = s.sk + s.sq - 1;
  const int64_t blocks =
      c.stats.forward.mask.rows.blocks * ((s.sk + c.stats.forward.mask.block_n - 1) / c.stats.forward.mask.block_n);
  const int64_t at = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (at < s.sk) {
    float sum = 0, top = 0, diagonal = 0;
    for (int64_t i = head * runs; i < (head + 1) * runs; ++i) {
      sum += c.stats.col_sum[i * s.sk + at];
      top = fmaxf(top, c.stats.col_max[i * s.sk + at]);
      diagonal += c.stats.diagonal[i * distances + s.sk - 1 - at];
    }
    c.col_sum[head * s.sk + at] = sum;
    c.col_max[head * s.sk + at] = top;
    c.diag_sum[head * s.sk + at] = diagonal;
  } else if (at < s.sk + blocks) {
    float sum = 0;
    for (int64_t i = head * c.splits; i < (head + 1) * c.splits; ++i) sum += c.stats.block_sum[i * blocks + at - s.sk];
    c.block_sum[head * blocks + at - s.sk] = sum;
  }
}

__global__ void __launch_bounds__(kReduceThreads)
    plain_mask_kernel(int sq, int sk, int block_m, int block_n, bool causal, PlainMask to) {
  const int at = int(blockIdx.x) * kReduceThreads + int(threadIdx.x);
  const int rows = (sq + block_m - 1) / block_m, blocks = (sk + block_n - 1) / block_n;
  const auto seen = [&](int query) { return causal ? min(max(query + 1 + sk - sq, 0), sk) : sk; };
  // Row iq sees the first blocks of keys: with idx descending, its entries are a suffix of idx, PARTIAL ones first.
  if (at < blocks) to.idx[at] = blocks - 1 - at;
  if (causal && at < sq) to.hi[at] = seen(at);
  if (at >= rows) return;
  const int full_keys = seen(at * block_m), keys = seen(min((at + 1) * block_m, sq) - 1);
  const int entries = (keys + block_n - 1) / block_n, full = full_keys == sk ? blocks : full_keys / block_n;
  to.ptr[at] = blocks - entries;
  to.cnt[at] = entries;
  to.nmask[at] = entries - full;
}

template <class T, int kDk>
cudaError_t launch_colstats(const ColStatsLaunch& c, dim3 grid, cudaStream_t stream) {
  using Tile = ColStatsTile<kDk>;
  const ColStatsParams p = {c, Scores(c.stats.forward.shape)};
  const auto run = [&](auto kernel) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    return error != cudaSuccess ? error : launch(kernel, grid, dim3(kThreads), Tile::kSharedBytes, stream, p);
  };
  if (c.partial_lse)
    if (const cudaError_t error = run(attention_colstats_lse_kernel<T, Tile>); error != cudaSuccess) return error;
  return run(attention_colstats_kernel<T, Tile>);
}

template <class T>
cudaError_t launch_colstats(const ColStatsLaunch& c, dim3 grid, cudaStream_t stream) {
  const int64_t d = c.stats.forward.shape.dk;
  if (d <= 64) return launch_colstats<T, 64>(c, grid, stream);
  if (d <= 128) return launch_colstats<T, 128>(c, grid, stream);
  return launch_colstats<T, 256>(c, grid, stream);
}

}  // namespace

cudaError_t launch_plain_mask(const AttentionShape& s, bool causal, int64_t block_m, int64_t block_n,
                              const PlainMask& to, cudaStream_t stream) {
  if (s.sq < 0 || s.sk < 0 || s.sq >= 1 << 30 || s.sk >= 1 << 30) return cudaErrorInvalidValue;
  const int64_t most = ceil_div(s.sk, block_n) > s.sq ? ceil_div(s.sk, block_n) : s.sq;
  if (most == 0) return cudaSuccess;
  return launch(plain_mask_kernel, dim3(unsigned(ceil_div(most, kReduceThreads))), dim3(kReduceThreads), 0, stream,
                int(s.sq), int(s.sk), int(block_m), int(block_n), causal, to);
}

cudaError_t launch_attention_colstats(const ColStatsLaunch& c, cudaStream_t stream) {
  AttentionForward f = c.stats.forward;
  f.shape.dv = f.shape.dk;  // there is no v
  const AttentionShape& s = f.shape;
  const int64_t heads = s.batch * s.heads_q, runs = c.stats.parts * c.splits;
  if (!is_attention_size(f) || (s.dtype != DType::bf16 && s.dtype != DType::f16) || runs < 1 || runs > INT32_MAX ||
      heads > 65535 || c.stats.queries.begin < 0 || c.stats.queries.end > s.sq)
    return cudaErrorInvalidValue;
  if (!is_aligned(f.q, f.q_strides, s.dk) || !is_aligned(f.k, f.k_strides, s.dk)) return cudaErrorMisalignedAddress;
  if (heads == 0) return cudaSuccess;
  const dim3 grid{unsigned(runs), unsigned(heads)};
  const cudaError_t error = s.dtype == DType::bf16 ? launch_colstats<__nv_bfloat16>(c, grid, stream)
                                                   : launch_colstats<__half>(c, grid, stream);
  if (error != cudaSuccess) return error;
  const int64_t out = s.sk + f.mask.rows.blocks * ceil_div(s.sk, f.mask.block_n);
  if (out == 0) return cudaSuccess;
  return launch(attention_colstats_reduce_kernel, dim3(unsigned(ceil_div(out, kReduceThreads)), unsigned(heads)),
                dim3(kReduceThreads), 0, stream, c);
}

}  // namespace slk::cuda
