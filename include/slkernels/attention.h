// Family `attention`: attention over the kept tiles of a mask, forward and backward.
//
//   s[i, j] = scale * q[i] . k[j];   with softcap c > 0:  s = c tanh(s / c);   s = -inf where the mask drops (i, j)
//   lse[i]  = log sum_j exp s[i, j];   p = exp(s - lse);   o[i] = sum_j p[i, j] v[j]
//   A row that keeps nothing: lse = -inf, o = 0, zero gradients.
//
// q [B, Hq, Sq, Dk], k [B, Hkv, Sk, Dk], v [B, Hkv, Sk, Dv], o [B, Hq, Sq, Dv], lse [B, Hq, Sq] (natural logarithm).
// Query head h reads kv head h / (Hq / Hkv) and mask head h / (Hq / Hm).
//
// Backward, with the gradients do of o and dlse of lse:
//   delta[i] = do[i] . o[i] - dlse[i];   ds = p * (do v^T - delta) * (1 - (s / c)^2);
//   dq = scale ds k;   dk = scale ds^T q (summed over the group's heads);   dv = p^T do (likewise)
//
// The mask (BlockRows): row r = (b, hm, iq) of R = batches * heads * row_blocks stands for the queries
// [iq * block_m, (iq + 1) * block_m). Its entries are t = row_ptr[r] + n, n < row_cnt[r]; entry t covers the keys
// [idx[t] * unit, idx[t] * unit + block_n). The first row_nmask[r] entries are PARTIAL, the rest FULL. A FULL entry
// keeps all of its tile; a PARTIAL one keeps
//   (i, j)  where  j < hi[i]  and  (j >= lo[i] or j < sink)  and  bit (i, j) of bits[bit_id[t]] is set (bit_id[t] >= 0)
// Queries >= Sq and keys >= Sk are never part of a tile. The columns col_idx[col_ptr[r] .. col_ptr[r + 1]) are single
// keys that every query of the row keeps. A key is listed at most once a row.
#pragma once

#include "slkernels/types.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

// The kernels of a CPU are compiled once per instruction set: an inline function that the linker could share between
// them would run with the wrong one.
#define SLK_ALWAYS_INLINE inline __attribute__((always_inline))

namespace slk {

// One direction of a block list. Entries [ptr[r], ptr[r] + cnt[r]) of idx belong to r; what lies between is not read.
struct BlockList {
  const int32_t *ptr, *cnt, *nmask;  // [batches, heads, blocks]
  const int32_t* idx;                // [capacity]
  const int32_t* bit_id;             // [capacity], -1: none; null: none at all
  int64_t capacity, blocks;
};

struct BlockRows {
  BlockList rows;          // blocks = ceil(Sq / block_m); idx counts units of keys
  int64_t batches, heads;  // 1 or B; 1, Hkv or Hq
  int64_t block_m, block_n, unit;
  const int32_t *lo, *hi;  // null: no bound on that side. Query i of batch b: b * batch + hm * head + i
  int64_t lo_batch, lo_head, hi_batch, hi_head;  // strides; 0 where the extent is 1
  int64_t sink;
  const uint32_t* bits;  // [bit_tiles, block_m, block_n / 32]; bit j % 32 of word j / 32 is column j
  int64_t bit_tiles;
  const int32_t *col_ptr, *col_idx;  // [R + 1], [columns]; null: none
  int64_t columns;

  // The list of one block: (b, h) are a batch and one of `heads_q` query heads.
  SLK_ALWAYS_INLINE int64_t list_of(int64_t b, int64_t h, int64_t heads_q, int64_t block, int64_t blocks) const {
    return (batch_of(b) * heads + head_of(h, heads_q)) * blocks + block;
  }
  SLK_ALWAYS_INLINE int64_t batch_of(int64_t b) const { return batches == 1 ? 0 : b; }
  SLK_ALWAYS_INLINE int64_t head_of(int64_t h, int64_t heads_q) const { return h / (heads_q / heads); }
};

// Elements between neighbours of [B, H, S, D]; D is contiguous.
struct HeadStrides {
  int64_t batch, head, token;
};

struct AttentionShape {
  int64_t batch, heads_q, heads_kv, sq, sk, dk, dv;
  double scale, softcap;  // softcap 0: none
  DType dtype;            // of q, k, v, o and their gradients; lse and delta are fp64 for f64, else fp32
};

struct AttentionForward {
  AttentionShape shape;
  BlockRows mask;
  const void *q, *k, *v;
  HeadStrides q_strides, k_strides, v_strides;
  void* o;
  HeadStrides o_strides;
  void* lse;  // [B, Hq, Sq], contiguous
};

// The backward needs unit == block_n and no columns.
struct AttentionBackward {
  AttentionForward forward;  // o and lse are read
  BlockList cols;            // the transpose: blocks = ceil(Sk / block_n), ordered (b, hm, jk); idx = iq, ascending
                             // within the PARTIAL and within the FULL entries of a column; bit_id as in the rows
  const void* d_o;
  HeadStrides d_o_strides;
  const void* dlse;  // [B, Hq, Sq], contiguous, lse's type; null: zero
  void* delta;       // [B, Hq, Sq], contiguous scratch, lse's type
  void *dq, *dk, *dv;
  HeadStrides dq_strides, dk_strides, dv_strides;
};

// The union of two disjoint sets of keys: lse = log(exp lse1 + exp lse2), o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2.
// o1, o2, o [B, H, S, D]; lse1, lse2, lse [B, H, S], contiguous, fp64 for f64, else fp32.
struct MergeStates {
  int64_t batch, heads, tokens, features;
  DType dtype;
  const void *o1, *o2, *lse1, *lse2;
  HeadStrides o1_strides, o2_strides;
  void *o, *lse;
  HeadStrides o_strides;
};

// With w1 = exp(lse1 - lse):  do1 = w1 do,  dlse1 = w1 (dlse + do . (o1 - o)); likewise the second.
struct MergeStatesBackward {
  MergeStates forward;  // o and lse are not used
  const void *d_o, *dlse;
  HeadStrides d_o_strides;
  void *do1, *do2, *dlse1, *dlse2;
  HeadStrides do1_strides, do2_strides;
};

// Statistics of p over the queries of a range, without p:
//   col_sum[j] = sum_i p[i, j],  col_max[j] = max_i p[i, j],  diagonal[Sk - 1 + j - (i + Sk - Sq)] += p[i, j],
//   block_sum[iq, jk] = sum of p over block_m queries and block_n keys
// Query i stands at position i + Sk - Sq: the last query at the last key. The first three are sums over `parts` runs of
// blocks of queries, kept apart so that the order of a sum depends on shapes only.
struct AttentionColStats {
  AttentionForward forward;  // q, k and lse are read; dv = 0
  Range queries;
  int64_t parts;
  float *col_sum, *col_max;  // [B, Hq, parts, Sk]
  float* diagonal;           // [B, Hq, parts, Sk + Sq - 1]
  float* block_sum;          // [B, Hq, ceil(Sq / block_m), ceil(Sk / block_n)]
};

namespace cpu {

// One unit of work; units are independent of each other, so that results do not depend on who does which.
struct AttentionItem {
  int64_t batch, head, block;  // block of queries of a query head, or of keys of a kv head
};

// Kernels assume a layout that lies inside: entries, bit tiles, columns.
struct AttentionKernels {
  // Floats of 64-byte aligned scratch that any call below needs.
  int64_t (*scratch)(const AttentionShape&, const BlockRows&);
  void (*forward)(const AttentionForward&, AttentionItem, float* scratch);       // o and lse of a block of queries
  void (*delta)(const AttentionBackward&, AttentionItem, float* scratch);        // of a block of queries
  void (*backward_q)(const AttentionBackward&, AttentionItem, float* scratch);   // dq of a block of queries
  void (*backward_kv)(const AttentionBackward&, AttentionItem, float* scratch);  // dk and dv of a block of keys
  void (*merge)(const MergeStates&, int64_t batch, int64_t head, Range tokens);
  void (*merge_backward)(const MergeStatesBackward&, int64_t batch, int64_t head, Range tokens);
  void (*colstats)(const AttentionColStats&, AttentionItem part, float* scratch);  // null for f64
};
const AttentionKernels& attention_kernels();      // f32, bf16, f16
const AttentionKernels& attention_kernels_f64();  // unblocked, for gradient checks; scratch is not used

}  // namespace cpu

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// bf16 and f16. An entry that lies outside (corrupt idx, bit_id, row_ptr or row_cnt) is skipped, never read.
cudaError_t launch_attention_forward_sm80(const AttentionForward&, cudaStream_t);
cudaError_t launch_attention_forward_sm90(const AttentionForward&, cudaStream_t);
// Writes delta, then dk and dv over the columns, then dq over the rows: no atomics.
cudaError_t launch_attention_backward_sm80(const AttentionBackward&, cudaStream_t);
cudaError_t launch_attention_backward_sm90(const AttentionBackward&, cudaStream_t);

// All float types.
cudaError_t launch_merge_attention_states(const MergeStates&, cudaStream_t);
cudaError_t launch_merge_attention_states_backward(const MergeStatesBackward&, cudaStream_t);

// The mask of a dense or causal (bottom right) attention, written to `mask`'s lists, ordered as its rows need: row_ptr,
// row_cnt, row_nmask [ceil(Sq / block_m)], idx [ceil(Sk / block_n)], hi [Sq] when causal.
struct PlainMask {
  int32_t *ptr, *cnt, *nmask, *idx, *hi;
};
cudaError_t launch_plain_mask(const AttentionShape&, bool causal, int64_t block_m, int64_t block_n, const PlainMask&,
                              cudaStream_t);

// bf16 and f16. Work is cut into `stats.parts` runs of blocks of queries times `splits` runs of the tiles of each
// block; stats' sums are scratch, zeros at entry: col_sum, col_max and diagonal [B, Hq, parts * splits, ...], block_sum
// [B, Hq, splits, ...]. stats.forward.lse null: it is worked out first, with partial_lse [B, Hq, Sq, splits, 2] as
// scratch. Results: [B, Hq, Sk], diag_sum[d] that of the distance d; block_sum as stats', without splits.
struct ColStatsLaunch {
  AttentionColStats stats;
  int64_t splits;
  float* partial_lse;
  float *col_sum, *col_max, *diag_sum, *block_sum;
};
cudaError_t launch_attention_colstats(const ColStatsLaunch&, cudaStream_t);

}  // namespace cuda
#endif

}  // namespace slk
