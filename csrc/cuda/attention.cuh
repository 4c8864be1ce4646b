// What the attention kernels of every architecture share: which rows a block works on, which keys a list names, what
// the predicate keeps, and the arithmetic of the scores. Contract: slkernels/attention.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "slkernels/attention.h"
#include "slkernels/launch.cuh"
#include "slkernels/ptx/math.h"
#include "slkernels/ptx/mma.h"
#include "slkernels/types.h"

namespace slk::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
#define SLK_INFINITY __int_as_float(0x7f800000)

// ---- element types

template <class T>
struct Element;
template <>
struct Element<__nv_bfloat16> {
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
  }
  __device__ static float2 unpack(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};
template <>
struct Element<__half> {
  __device__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
  }
  __device__ static float2 unpack(uint32_t bits) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, 4);
    return __half22float2(pair);
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
};

// ---- scores

// A raw product q . k becomes a logit in base 2: logit = `to_log2` * transform(product). Without softcap the transform
// is the identity, so that one multiplication serves scale, base and the maximum's shift together.
struct Scores {
  float to_log2;  // > 0
  // Where neither a maximum is taken nor -inf stands for a dropped pair, a negative scale needs no transform:
  // logit = signed_to_log2 * product.
  float signed_to_log2;
  float exponent;  // softcap: transform(x) = tanh(x scale / softcap) = 1 - 2 / (1 + 2^(exponent x))
  bool negative;   // else: transform(x) = -x
  bool capped;

  // scale = 0 is a cap of 1 on products of 0: all logits are 0, and -inf stays -inf.
  explicit Scores(const AttentionShape& shape) : capped(shape.softcap > 0 || shape.scale == 0) {
    const double cap = shape.softcap > 0 ? shape.softcap : 1;
    exponent = float(2 * 1.4426950408889634 * shape.scale / cap);
    negative = !capped && shape.scale < 0;
    to_log2 = kLog2e * float(capped ? cap : negative ? -shape.scale : shape.scale);
    signed_to_log2 = negative ? -to_log2 : to_log2;
  }
  __host__ __device__ bool plain() const { return !capped && !negative; }
  // Its absolute error of 1e-7 is softcap * 1e-7 in the logit.
  __device__ float transform(float x) const {
    if (!capped) return -x;
    return 1.f - 2.f * ptx::reciprocal_approx(1.f + ptx::exp2_approx(exponent * x));
  }
};

// ---- rows

// How the rows of a block's tile are dealt to queries: stripes of 2^shift rows, one query head each, heads of a group
// that share mask and keys. Masks of 64 rows then fill tiles of 128, and a few queries (decoding) fill a tile by heads.
struct Stripes {
  int shift;          // log2 of a stripe's rows
  int heads;          // stripes of a tile
  int tiles_a_group;  // tiles that the heads of a kv head take
  int tiles_a_block;  // tiles that a row of the mask takes
  int64_t tiles;      // in all

  Stripes(const AttentionShape& s, const BlockRows& m, int tile_rows, int least_rows = 1) {
    const int64_t group = s.heads_q / s.heads_kv;
    const bool shared = group > 1 && m.heads != s.heads_q;
    int64_t rows = m.block_m < tile_rows ? m.block_m : tile_rows;
    while (shared && rows / 2 >= s.sq && rows > least_rows && tile_rows / rows < group) rows /= 2;
    shift = 0;
    while ((int64_t(1) << shift) < rows) ++shift;
    heads = shared ? int(tile_rows / rows < group ? tile_rows / rows : group) : 1;
    tiles_a_group = int(ceil_div(group, heads));
    // A block of the mask that the queries do not fill needs no tiles for the rest.
    const int64_t used = s.sq < m.block_m ? s.sq : m.block_m;
    tiles_a_block = int(ceil_div(used, rows));
    tiles = s.batch * s.heads_kv * tiles_a_group * m.rows.blocks * tiles_a_block;
  }
};

// The rows of one tile.
struct TileRows {
  int b, head, heads, kv_head, mask_head;
  int block, first, end;  // row of the mask; queries [first, end) of each stripe
  int shift;

  // Tiles that run together share a kv head. The last rows come first: under a causal mask they are the longest.
  __device__ TileRows(const AttentionShape& s, const BlockRows& m, const Stripes& stripes, int64_t tile) {
    const int row_tiles = int(m.rows.blocks) * stripes.tiles_a_block;
    const int row_tile = row_tiles - 1 - int(tile % row_tiles);
    int rest = int(tile / row_tiles);
    const int group_tile = rest % stripes.tiles_a_group;
    rest /= stripes.tiles_a_group;
    kv_head = rest % int(s.heads_kv);
    b = rest / int(s.heads_kv);
    const int group = int(s.heads_q / s.heads_kv);
    head = kv_head * group + group_tile * stripes.heads;
    heads = min(stripes.heads, group - group_tile * stripes.heads);
    mask_head = head / int(s.heads_q / m.heads);
    shift = stripes.shift;
    block = row_tile / stripes.tiles_a_block;
    first = block * int(m.block_m) + ((row_tile % stripes.tiles_a_block) << shift);
    end = min(first + (1 << shift), int(s.sq));
  }
  // Queries [first, end) of one head, in rows of the mask's block `block`; end - first <= 64.
  __device__ TileRows(const AttentionShape& s, const BlockRows& m, int b_, int head_, int block_, int first_, int end_)
      : b(b_),
        head(head_),
        heads(1),
        kv_head(head_ / int(s.heads_q / s.heads_kv)),
        mask_head(head_ / int(s.heads_q / m.heads)),
        block(block_),
        first(first_),
        end(end_),
        shift(6) {}
  __device__ int head_of(int row) const { return head + (row >> shift); }
  __device__ int query_of(int row) const { return first + (row & ((1 << shift) - 1)); }
  __device__ bool holds(int row) const { return (row >> shift) < heads && query_of(row) < end; }
};

template <class T>
__device__ const T* at_head(const void* base, const HeadStrides& strides, int b, int head) {
  return static_cast<const T*>(base) + b * strides.batch + head * strides.head;
}

__device__ inline float* lse_of(const AttentionForward& f, const TileRows& rows, int row) {
  return static_cast<float*>(f.lse) + (rows.b * f.shape.heads_q + rows.head_of(row)) * f.shape.sq + rows.query_of(row);
}

// ---- lists

// Entries [begin, end) of a list, PARTIAL before `full`; what a corrupt list names outside its pool is left out.
struct Entries {
  int begin, full, end;
  __device__ Entries(const BlockList& list, int64_t row) {
    const int64_t ptr = list.ptr[row], count = list.cnt[row], partial = list.nmask[row];
    const auto clamp = [](int64_t x, int64_t low, int64_t high) { return int(x < low ? low : x > high ? high : x); };
    begin = clamp(ptr, 0, list.capacity);
    end = clamp(ptr + count, begin, list.capacity);
    full = clamp(ptr + partial, begin, end);
  }
};
__device__ inline int64_t list_row(const BlockRows& m, int64_t blocks, int b, int mask_head, int block) {
  return (int64_t(m.batches == 1 ? 0 : b) * m.heads + mask_head) * blocks + block;
}

// The first key of an entry; `sk` (no keys) where it lies outside.
__device__ inline int first_key(int index, int64_t unit, int sk) {
  const int64_t start = index * unit;
  return start < 0 || start >= sk ? sk : int(start);
}

// ---- the predicate of PARTIAL entries

// The bits of an entry: null where it has none. A corrupt id keeps nothing: `skip`.
struct EntryBits {
  const uint32_t* words = nullptr;
  bool skip = false;
  __device__ EntryBits(const BlockRows& m, const int32_t* bit_id, int entry) {
    const int id = bit_id ? bit_id[entry] : -1;
    if (id < 0) return;
    skip = id >= m.bit_tiles;
    if (!skip) words = m.bits + int64_t(id) * m.block_m * (m.block_n / 32);
  }
};
// Bits [begin, end) of a word, for any begin and end.
__device__ inline uint32_t bit_range(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1; };
  return below(end) & ~below(begin);
}
// Bounds of a query's keys: keep j < hi and (j >= lo or j < sink).
struct Bounds {
  int lo, hi;
  __device__ Bounds(const BlockRows& m, int b, int mask_head, int query) {
    lo = m.lo ? m.lo[b * m.lo_batch + mask_head * m.lo_head + query] : INT_MIN;
    hi = m.hi ? m.hi[b * m.hi_batch + mask_head * m.hi_head + query] : INT_MAX;
  }
  // Bit i: whether key first + i is kept.
  __device__ uint32_t word(int64_t first, int64_t sink) const {
    const int64_t end = hi - first;
    return bit_range(lo - first, end) | bit_range(0, end < sink - first ? end : sink - first);
  }
  __device__ bool keeps(int key, int64_t sink) const { return key < hi && (key >= lo || key < sink); }
};

// ---- launching

inline bool is_attention_size(const AttentionForward& f) {
  const AttentionShape& s = f.shape;
  const auto fits = [](int64_t size) { return size >= 0 && size < (int64_t(1) << 30); };
  const auto block = [](int64_t size) { return size == 64 || size == 128; };
  return fits(s.batch) && fits(s.heads_q) && fits(s.heads_kv) && fits(s.sq) && fits(s.sk) && s.dk > 0 && s.dk <= 256 &&
         s.dv > 0 && s.dv <= 256 && s.heads_kv > 0 && s.heads_q % s.heads_kv == 0 && f.mask.heads > 0 &&
         s.heads_q % f.mask.heads == 0 && block(f.mask.block_m) && block(f.mask.block_n) &&
         (f.mask.unit == 1 || f.mask.unit == f.mask.block_n);
}
// 16-byte copies: heads and tokens start at multiples of 8 elements, and so do the dimensions end.
inline bool is_aligned(const void* base, const HeadStrides& s, int64_t d) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && s.batch % 8 == 0 && s.head % 8 == 0 && s.token % 8 == 0 &&
         d % 8 == 0;
}
inline cudaError_t check_attention(const AttentionForward& f) {
  const AttentionShape& s = f.shape;
  if (!is_attention_size(f) || (s.dtype != DType::bf16 && s.dtype != DType::f16)) return cudaErrorInvalidValue;
  const bool aligned = is_aligned(f.q, f.q_strides, s.dk) && is_aligned(f.k, f.k_strides, s.dk) &&
                       is_aligned(f.v, f.v_strides, s.dv) && is_aligned(f.o, f.o_strides, s.dv);
  return aligned ? cudaSuccess : cudaErrorMisalignedAddress;
}

}  // namespace slk::cuda
