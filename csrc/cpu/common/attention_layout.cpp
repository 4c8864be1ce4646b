// Builders of BlockRows on the CPU: integer work without SIMD words. Contracts: slkernels/attention_layout.h.
#include "slkernels/attention_layout.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace slk::cpu {
namespace {

// Lists a row's tiles: partial ones, then full ones. Returns the row's slot.
int64_t emit_row(const RowLists& out, int64_t r, const std::vector<TileKind>& kinds) {
  const int64_t slot = r * out.width;
  int32_t* idx = out.idx + slot;
  int32_t count = 0;
  for (const TileKind wanted : {kTilePartial, kTileFull}) {
    if (wanted == kTileFull) out.nmask[r] = count;
    for (size_t j = 0; j < kinds.size(); ++j)
      if (kinds[j] == wanted) idx[count++] = int32_t(j);
  }
  out.ptr[r] = int32_t(slot);
  out.cnt[r] = count;
  return slot;
}

template <class Kind>
void emit_rows(const Tiling& tiling, const RowLists& out, Range rows, const Kind& kind) {
  std::vector<TileKind> kinds(tiling.k_blocks());
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    kind(r, r % tiling.q_blocks(), kinds);
    emit_row(out, r, kinds);
  }
}

// ---- bitmaps

// Packs `count` <= 32 bools, one byte each, into bits.
uint32_t pack_bools(const bool* from, int64_t count) {
  uint32_t word = 0;
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {  // eight bytes 0/1 into a byte: the product moves byte k's bit to bit 56 + k
    uint64_t bytes;
    std::memcpy(&bytes, from + j, 8);
    word |= uint32_t(bytes * 0x0102040810204080u >> 56) << j;
  }
  for (; j < count; ++j) word |= uint32_t(from[j]) << j;
  return word;
}

// Ors and ands `count` bools.
void fold_bools(const bool* from, int64_t count, uint64_t& any, uint64_t& all) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t ors = 0, ands = kOnes;
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, from + j, 8);
    ors |= bytes;
    ands &= bytes;
  }
  for (; j < count; ++j) {
    ors |= from[j];
    ands &= from[j] ? kOnes : 0;
  }
  any |= ors;
  all &= ands == kOnes;
}

// Gives each of the row's partial entries a bitmap, filled by write(words, jk).
template <class Write>
void emit_bits(const Tiling& t, const RowLists& out, const TileBits& bits, int64_t r, const Write& write) {
  const int64_t slot = r * out.width, words = t.M * (t.N / 32);
  for (int64_t n = 0; n < out.cnt[r]; ++n) {
    const bool partial = n < out.nmask[r];
    const int64_t id = r * bits.per_row + n;
    bits.id[slot + n] = partial ? int32_t(id) : -1;
    if (!partial) continue;
    uint32_t* tile = bits.bits + id * words;
    std::memset(tile, 0, words * sizeof *tile);
    write(tile, int64_t(out.idx[slot + n]));
  }
}

}  // namespace

void layout_block_mask(const BlockMaskArgs& args, const RowLists& out, Range rows) {
  const Tiling& t = args.tiling;
  emit_rows(t, out, rows, [&](int64_t r, int64_t iq, std::vector<TileKind>& kinds) {
    const bool* mask = args.mask + r * t.k_blocks();
    for (size_t j = 0; j < kinds.size(); ++j)
      kinds[j] = !mask[j] ? kTileNone : args.causal ? t.causal(iq, int64_t(j)) : kTileFull;
  });
}

void layout_topk(const TopkArgs& args, const RowLists& out, Range rows) {
  const Tiling& t = args.tiling;
  emit_rows(t, out, rows, [&](int64_t r, int64_t iq, std::vector<TileKind>& kinds) {
    std::fill(kinds.begin(), kinds.end(), kTileNone);
    for (int64_t n = 0; n < args.k; ++n) {
      const int64_t j = args.indices[r * args.k + n];
      if (j >= 0) kinds[j] = args.causal ? t.causal(iq, j) : kTileFull;
    }
  });
}

void layout_interval(const IntervalArgs& args, const RowLists& out, Range rows) {
  const Tiling& t = args.tiling;
  emit_rows(t, out, rows, [&](int64_t r, int64_t iq, std::vector<TileKind>& kinds) {
    const int64_t first = r / t.q_blocks() * t.Sq + iq * t.M;
    IntervalRow row = {args.lo + first, args.hi + first, t.q_end(iq) - iq * t.M, args.sink, 0, 0, 0, 0, 0, 0};
    row.start();
    for (int64_t q = 0; q < row.queries; ++q) row.add(q);
    for (size_t j = 0; j < kinds.size(); ++j) kinds[j] = row.kind(int64_t(j) * t.N, t.k_end(int64_t(j)));
  });
}

void layout_cu_seqlens(const CuSeqlensArgs& args) {
  std::fill(args.lo, args.lo + args.Sq, 0);
  std::fill(args.hi, args.hi + args.Sq, 0);
  for (int64_t d = 0; d < args.documents; ++d) {
    const int32_t q0 = args.cu_q[d], q1 = args.cu_q[d + 1], k0 = args.cu_k[d], k1 = args.cu_k[d + 1];
    for (int32_t i = q0; i < q1; ++i) {
      args.lo[i] = k0;
      args.hi[i] = args.causal ? std::max(k0, k1 - (q1 - 1 - i)) : k1;
    }
  }
}

void layout_vertical_slash(const VerticalSlashArgs& args, const RowLists& out) {
  const int64_t q_blocks = ceil_div(args.S, args.block);
  int32_t columns = 0;
  std::vector<int32_t> full;
  for (int64_t r = 0; r < out.rows; ++r) {
    const int64_t iq = r % q_blocks, group = r / q_blocks;
    int32_t* idx = out.idx + r * out.width;
    int32_t partial = 0;
    args.col_ptr[r] = columns;
    full.clear();
    vertical_slash_row(
        iq, args.block, args.vertical + group * args.verticals, args.verticals, args.slash + group * args.slashes,
        args.slashes,
        [&](int64_t start) {
          if (start >= args.S) return;
          if (start + args.block - 1 <= iq * args.block)
            full.push_back(int32_t(start));
          else
            idx[partial++] = int32_t(start);
        },
        [&](int64_t column) { args.col_idx[columns++] = int32_t(column); });
    std::copy(full.begin(), full.end(), idx + partial);
    out.ptr[r] = int32_t(r * out.width);
    out.nmask[r] = partial;
    out.cnt[r] = partial + int32_t(full.size());
  }
  args.col_ptr[out.rows] = columns;
}

void layout_dense_mask(const DenseMaskArgs& args, const RowLists& out, const TileBits& bits, Range rows) {
  const Tiling& t = args.tiling;
  const int64_t blocks = t.k_blocks();
  std::vector<TileKind> kinds(blocks);
  std::vector<uint64_t> any(blocks), all(blocks);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t iq = r % t.q_blocks(), queries = t.q_end(iq) - iq * t.M;
    const bool* mask = args.mask + (r / t.q_blocks() * t.Sq + iq * t.M) * t.Sk;
    std::fill(any.begin(), any.end(), 0);
    std::fill(all.begin(), all.end(), 1);
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t j = 0; j < blocks; ++j) fold_bools(mask + i * t.Sk + j * t.N, t.k_end(j) - j * t.N, any[j], all[j]);
    for (int64_t j = 0; j < blocks; ++j) kinds[j] = all[j] ? kTileFull : any[j] ? kTilePartial : kTileNone;
    emit_row(out, r, kinds);
    emit_bits(t, out, bits, r, [&](uint32_t* tile, int64_t j) {
      const int64_t keys = t.k_end(j) - j * t.N;
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t w = 0; w * 32 < keys; ++w)
          tile[i * (t.N / 32) + w] =
              pack_bools(mask + i * t.Sk + j * t.N + w * 32, std::min<int64_t>(32, keys - w * 32));
    });
  }
}

void layout_tree(const TreeArgs& args, const RowLists& out, const TileBits& bits, Range rows) {
  const Tiling& t = args.tiling;
  std::vector<TileKind> kinds(t.k_blocks());
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t iq = r % t.q_blocks(), group = r / t.q_blocks(), prefix = args.prefix[group];
    const int32_t* parent = args.parent + group * t.Sq;
    for (int64_t j = 0; j < t.k_blocks(); ++j)
      kinds[j] = t.k_end(j) <= prefix ? kTileFull : j * t.N < prefix + t.Sq ? kTilePartial : kTileNone;
    emit_row(out, r, kinds);
    emit_bits(t, out, bits, r, [&](uint32_t* tile, int64_t j) {
      for (int64_t i = iq * t.M; i < t.q_end(iq); ++i) {
        uint32_t* words = tile + (i - iq * t.M) * (t.N / 32);
        const auto keep = [&](int64_t key) {
          const int64_t at = key - j * t.N;
          if (at >= 0 && at < t.N) words[at / 32] |= 1u << (at % 32);
        };
        for (int64_t key = j * t.N; key < std::min(prefix, t.k_end(j)); ++key) keep(key);
        for (int64_t node = i; node >= 0; node = parent[node]) keep(prefix + node);
      }
    });
  }
}

void layout_transpose(const BlockRows& in, const TransposedLists& out, int64_t k_blocks) {
  const BlockList& rows = in.rows;
  const int64_t groups = in.batches * in.heads, columns = groups * k_blocks;
  const auto each = [&](const auto& visit) {
    for (int64_t r = 0; r < groups * rows.blocks; ++r)
      for (int32_t n = 0; n < rows.cnt[r]; ++n) {
        const int64_t e = int64_t(rows.ptr[r]) + n;
        visit(r / rows.blocks * k_blocks + rows.idx[e], e, int32_t(r % rows.blocks), n < rows.nmask[r]);
      }
  };
  std::fill(out.cnt, out.cnt + columns, 0);
  std::fill(out.nmask, out.nmask + columns, 0);
  each([&](int64_t c, int64_t, int32_t, bool partial) {
    ++out.cnt[c];
    out.nmask[c] += partial;
  });
  std::vector<int32_t> next_partial(columns), next_full(columns);
  int32_t slot = 0;
  for (int64_t c = 0; c < columns; ++c) {
    out.ptr[c] = next_partial[c] = slot;
    next_full[c] = slot + out.nmask[c];
    slot += out.cnt[c];
  }
  each([&](int64_t c, int64_t e, int32_t iq, bool partial) {
    const int32_t to = partial ? next_partial[c]++ : next_full[c]++;
    out.idx[to] = iq;
    if (out.bit_id) out.bit_id[to] = partial ? rows.bit_id[e] : -1;
  });
}

}  // namespace slk::cpu
