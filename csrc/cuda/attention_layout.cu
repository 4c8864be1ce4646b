// Builders of BlockRows on the device: the lists of csrc/cpu/common/attention_layout.cpp, bit for bit, without host
// synchronisation. Contracts: slkernels/attention_layout.h.
//
// A warp lists a row: its lanes classify 32 tiles at a time, a ballot gives each kept tile its place. Partial tiles
// come first, so the row is classified twice; the second pass reads what the first brought into L1. Traffic: the input
// once, 4 bytes an entry; a mask of [32 heads, 1024 x 1024] blocks is 32 MB, about 12 us at 3 TB/s.
#include "slkernels/attention_layout.h"
#include "slkernels/launch.cuh"

namespace slk::cuda {
namespace {

constexpr int kWarps = 4;  // rows a block
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// Lists row r from kind(jk). All lanes of the warp take part.
template <class Kind>
__device__ void emit_row(const RowLists& out, int64_t r, int64_t k_blocks, const Kind& kind) {
  const int lane = threadIdx.x % 32;
  int32_t* idx = out.idx + r * out.width;
  int count = 0, partial = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const TileKind wanted = pass == 0 ? kTilePartial : kTileFull;
    for (int64_t first = 0; first < k_blocks; first += 32) {
      const int64_t j = first + lane;
      const bool listed = j < k_blocks && kind(j) == wanted;
      const unsigned votes = __ballot_sync(kAllLanes, listed);
      const int place = count + __popc(votes & ((1u << lane) - 1));
      if (listed && place < out.width) idx[place] = int32_t(j);
      count += __popc(votes);
    }
    if (pass == 0) partial = count;
  }
  if (lane == 0) {
    const bool fits = count <= out.width;
    out.ptr[r] = int32_t(r * out.width);
    out.cnt[r] = fits ? count : -1;  // corrupt by contract: the row is skipped, and layout_check names it
    out.nmask[r] = fits ? partial : 0;
  }
}

__device__ int64_t warp_row() {
  return int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
}

__global__ void layout_block_mask_kernel(BlockMaskArgs args, RowLists out) {
  const Tiling t = args.tiling;
  const int64_t r = warp_row(), k_blocks = t.k_blocks();
  if (r >= out.rows) return;
  const bool* mask = args.mask + r * k_blocks;
  const int64_t iq = r % t.q_blocks();
  emit_row(out, r, k_blocks, [&](int64_t j) {
    return !mask[j] ? kTileNone : args.causal ? t.causal(iq, j) : kTileFull;
  });
}

// A block of one warp a row: `words` bits in shared memory say which blocks are chosen, so that order and repetition
// do not matter.
__global__ void layout_topk_kernel(TopkArgs args, RowLists out, int words) {
  uint32_t* chosen = dynamic_shared<uint32_t>();  // [words]
  const Tiling t = args.tiling;
  const int64_t r = blockIdx.x, k_blocks = t.k_blocks(), iq = r % t.q_blocks();
  for (int w = threadIdx.x; w < words; w += 32) chosen[w] = 0;
  __syncwarp();
  for (int64_t n = threadIdx.x; n < args.k; n += 32) {
    const int64_t j = args.indices[r * args.k + n];
    if (j >= 0 && j < k_blocks) atomicOr(&chosen[j / 32], 1u << (j % 32));
  }
  __syncwarp();
  emit_row(out, r, k_blocks, [&](int64_t j) {
    if (!(chosen[j / 32] >> (j % 32) & 1)) return kTileNone;
    return args.causal ? t.causal(iq, j) : kTileFull;
  });
}

__global__ void layout_interval_kernel(IntervalArgs args, RowLists out) {
  const Tiling t = args.tiling;
  const int64_t r = warp_row();
  if (r >= out.rows) return;
  const int64_t iq = r % t.q_blocks(), first = r / t.q_blocks() * t.Sq + iq * t.M;
  IntervalRow row = {args.lo + first, args.hi + first, t.q_end(iq) - iq * t.M, args.sink, 0, 0, 0, 0, 0, 0};
  row.start();
  for (int64_t q = 0; q < row.queries; ++q) row.add(q);  // every lane: broadcast loads, no exchange
  emit_row(out, r, t.k_blocks(), [&](int64_t j) { return row.kind(j * t.N, t.k_end(j)); });
}

// A thread a query: the last document that begins at or before it.
__global__ void layout_cu_seqlens_kernel(CuSeqlensArgs args) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.Sq) return;
  int64_t low = 0, high = args.documents;  // cu_q[low] <= i < cu_q[high], once both are inside
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (args.cu_q[middle] <= i)
      low = middle;
    else
      high = middle;
  }
  int32_t lo = 0, hi = 0;
  if (args.documents > 0 && i >= args.cu_q[low] && i < args.cu_q[low + 1]) {
    lo = args.cu_k[low];
    hi = args.cu_k[low + 1];
    if (args.causal) {
      hi -= args.cu_q[low + 1] - 1 - int32_t(i);
      hi = hi > lo ? hi : lo;
    }
  }
  args.lo[i] = lo;
  args.hi[i] = hi;
}

// ---- bitmaps

// A block a tile: a warp takes a query, its lanes 32 keys; the ballot is the bitmap's word.
__global__ void layout_dense_tile_kernel(DenseMaskArgs args, TileBits bits, uint8_t* kinds) {
  __shared__ int any[kWarps], all[kWarps];
  const Tiling t = args.tiling;
  const int64_t k_blocks = t.k_blocks(), tile = blockIdx.x, r = tile / k_blocks, j = tile % k_blocks;
  const int64_t iq = r % t.q_blocks(), queries = t.q_end(iq) - iq * t.M, keys = t.k_end(j) - j * t.N;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, words = int(t.N / 32);
  const bool* mask = args.mask + (r / t.q_blocks() * t.Sq + iq * t.M) * t.Sk + j * t.N;
  unsigned ors = 0, misses = 0;
  for (int64_t i = warp; i < t.M; i += kWarps)
    for (int w = 0; w < words; ++w) {
      const int64_t key = w * 32 + lane;
      const bool inside = i < queries && key < keys, kept = inside && mask[i * t.Sk + key];
      const unsigned word = __ballot_sync(kAllLanes, kept);
      misses |= __ballot_sync(kAllLanes, inside && !kept);
      ors |= word;
      if (lane == 0) bits.bits[(tile * t.M + i) * words + w] = word;
    }
  if (lane == 0) {
    any[warp] = ors != 0;
    all[warp] = misses == 0;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int some = 0, full = 1;
  for (int w = 0; w < kWarps; ++w) {
    some |= any[w];
    full &= all[w];
  }
  kinds[tile] = full ? kTileFull : some ? kTilePartial : kTileNone;
}

// Gives row r's partial entries their tiles' bitmaps.
__device__ void emit_bit_ids(const RowLists& out, const TileBits& bits, int64_t r, int64_t first) {
  const int64_t slot = r * out.width;
  __syncwarp();  // the lists were written by all lanes
  for (int n = threadIdx.x % 32; n < out.cnt[r]; n += 32)
    bits.id[slot + n] = n < out.nmask[r] ? int32_t(r * bits.per_row + out.idx[slot + n] - first) : -1;
}

__global__ void layout_dense_rows_kernel(DenseMaskArgs args, RowLists out, TileBits bits, const uint8_t* kinds) {
  const int64_t r = warp_row(), k_blocks = args.tiling.k_blocks();
  if (r >= out.rows) return;
  emit_row(out, r, k_blocks, [&](int64_t j) { return TileKind(kinds[r * k_blocks + j]); });
  emit_bit_ids(out, bits, r, 0);
}

__global__ void layout_tree_rows_kernel(TreeArgs args, RowLists out, TileBits bits) {
  const Tiling t = args.tiling;
  const int64_t r = warp_row();
  if (r >= out.rows) return;
  const int64_t prefix = args.prefix[r / t.q_blocks()];
  emit_row(out, r, t.k_blocks(), [&](int64_t j) { return tree_tile(t, prefix, j); });
  emit_bit_ids(out, bits, r, prefix / t.N);
}

// A thread a node: its row of the bitmaps of all tiles that hold nodes.
__global__ void layout_tree_bits_kernel(TreeArgs args, TileBits bits, int64_t rows) {
  const Tiling t = args.tiling;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, r = at / t.M, i = at % t.M;
  if (r >= rows) return;
  const int64_t group = r / t.q_blocks(), prefix = args.prefix[group], words = t.N / 32;
  const int64_t first_key = prefix / t.N * t.N, keys = bits.per_row * t.N;
  uint32_t* own = bits.bits + (r * bits.per_row * t.M + i) * words;  // of the row's first bitmap
  const auto word = [&](int64_t key) -> uint32_t& { return own[key / t.N * t.M * words + key % t.N / 32]; };
  for (int64_t key = 0; key < keys; key += 32) word(key) = 0;
  const int64_t query = r % t.q_blocks() * t.M + i;
  if (query >= t.Sq) return;
  const auto keep = [&](int64_t key) {
    const int64_t local = key - first_key;
    if (local >= 0 && local < keys) word(local) |= 1u << (local % 32);
  };
  for (int64_t key = first_key; key < prefix; ++key) keep(key);
  const int32_t* parent = args.parent + group * t.Sq;
  int64_t node = query;
  while (node >= 0) {
    keep(prefix + node);
    const int64_t next = parent[node];
    if (next >= node) break;  // not a tree
    node = next;
  }
}

unsigned row_blocks(const RowLists& out) {
  return unsigned(ceil_div(out.rows, kWarps));
}

}  // namespace

cudaError_t launch_layout_block_mask(const BlockMaskArgs& args, const RowLists& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  return launch(layout_block_mask_kernel, row_blocks(out), kThreads, 0, stream, args, out);
}

cudaError_t launch_layout_topk(const TopkArgs& args, const RowLists& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  const int64_t words = ceil_div(args.tiling.k_blocks(), 32);
  if (words * 4 > 48 << 10) return cudaErrorInvalidValue;  // 25 million keys
  return launch(layout_topk_kernel, unsigned(out.rows), 32, size_t(words * 4), stream, args, out, int(words));
}

cudaError_t launch_layout_interval(const IntervalArgs& args, const RowLists& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  return launch(layout_interval_kernel, row_blocks(out), kThreads, 0, stream, args, out);
}

cudaError_t launch_layout_cu_seqlens(const CuSeqlensArgs& args, cudaStream_t stream) {
  if (args.Sq == 0) return cudaSuccess;
  return launch(layout_cu_seqlens_kernel, unsigned(ceil_div(args.Sq, kThreads)), kThreads, 0, stream, args);
}

cudaError_t launch_layout_dense_mask(const DenseMaskArgs& args, const RowLists& out, const TileBits& bits,
                                     uint8_t* kinds, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  const int64_t tiles = out.rows * args.tiling.k_blocks();
  if (tiles > 0) {
    const cudaError_t error = launch(layout_dense_tile_kernel, unsigned(tiles), kThreads, 0, stream, args, bits, kinds);
    if (error != cudaSuccess) return error;
  }
  return launch(layout_dense_rows_kernel, row_blocks(out), kThreads, 0, stream, args, out, bits, kinds);
}

cudaError_t launch_layout_tree(const TreeArgs& args, const RowLists& out, const TileBits& bits, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  const cudaError_t error = launch(layout_tree_rows_kernel, row_blocks(out), kThreads, 0, stream, args, out, bits);
  if (error != cudaSuccess) return error;
  return launch(layout_tree_bits_kernel, unsigned(ceil_div(out.rows * args.tiling.M, kThreads)), kThreads, 0, stream,
                args, bits, out.rows);
}

}  // namespace slk::cuda
