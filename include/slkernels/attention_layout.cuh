// Which kv tiles a mask keeps: the arithmetic that the CPU's and the device's builders of BlockRows share.
//
// A tile (iq, jk) is the queries [iq M, iq M + M) and the keys [jk N, jk N + N), cut at Sq and Sk. Every classifier
// answers none (no pair kept), full (all kept) or partial, exactly.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SLK_LAYOUT_HD __host__ __device__
#else
#define SLK_LAYOUT_HD
#endif

namespace slk {

enum TileKind : uint8_t { kTileNone = 0, kTilePartial = 1, kTileFull = 2 };

struct Tiling {
  int64_t M, N, Sq, Sk;

  SLK_LAYOUT_HD int64_t q_blocks() const { return (Sq + M - 1) / M; }
  SLK_LAYOUT_HD int64_t k_blocks() const { return (Sk + N - 1) / N; }
  SLK_LAYOUT_HD int64_t q_end(int64_t iq) const { return (iq + 1) * M < Sq ? (iq + 1) * M : Sq; }
  SLK_LAYOUT_HD int64_t k_end(int64_t jk) const { return (jk + 1) * N < Sk ? (jk + 1) * N : Sk; }

  // Causal, aligned at the end: query i sees the keys j <= i + Sk - Sq.
  SLK_LAYOUT_HD TileKind causal(int64_t iq, int64_t jk) const {
    const int64_t shift = Sk - Sq;
    if (jk * N > q_end(iq) - 1 + shift) return kTileNone;
    return k_end(jk) - 1 <= iq * M + shift ? kTileFull : kTilePartial;
  }
};

// keep(i, j) = j < hi[i] and (j >= lo[i] or j < sink): the keys [0, a) and [lo, hi), disjoint.
struct Interval {
  int64_t a, lo, hi;

  SLK_LAYOUT_HD static Interval make(int64_t lo, int64_t hi, int64_t sink) {
    Interval v = {sink < hi ? sink : hi, lo, hi};
    if (v.lo <= v.a) v = {0, 0, hi};
    return v;
  }
  SLK_LAYOUT_HD bool touches(int64_t s, int64_t e) const { return s < a || (lo < hi && lo < e && s < hi); }
  SLK_LAYOUT_HD bool covers(int64_t s, int64_t e) const { return e <= a || (lo <= s && e <= hi); }
};

// The queries of one q block. `summary` decides most tiles from extremes; `decide` looks at every query.
struct IntervalRow {
  const int32_t *lo, *hi;  // of this row's first query
  int64_t queries, sink;
  int64_t max_a, min_a, min_lo, max_lo, min_hi, max_hi;

  SLK_LAYOUT_HD void start() {
    max_a = max_hi = max_lo = INT64_MIN;
    min_a = min_lo = min_hi = INT64_MAX;
  }
  SLK_LAYOUT_HD void add(int64_t q) {
    const Interval v = Interval::make(lo[q], hi[q], sink);
    max_a = v.a > max_a ? v.a : max_a;
    min_a = v.a < min_a ? v.a : min_a;
    max_lo = v.lo > max_lo ? v.lo : max_lo;
    min_hi = v.hi < min_hi ? v.hi : min_hi;
    if (v.lo >= v.hi) return;
    min_lo = v.lo < min_lo ? v.lo : min_lo;
    max_hi = v.hi > max_hi ? v.hi : max_hi;
  }
  SLK_LAYOUT_HD TileKind kind(int64_t s, int64_t e) const {
    if (s >= max_a && (s >= max_hi || e <= min_lo)) return kTileNone;
    if (e <= min_a || (max_lo <= s && e <= min_hi)) return kTileFull;
    bool any = false, all = true;
    for (int64_t q = 0; q < queries && (all || !any); ++q) {
      const Interval v = Interval::make(lo[q], hi[q], sink);
      any |= v.touches(s, e);
      all &= v.covers(s, e);
    }
    return all ? kTileFull : any ? kTilePartial : kTileNone;
  }
};

// MInference's vertical-slash index (arXiv 2407.02490, appendix C): the tiles and single columns of q block `iq` of a
// causal prompt, for tiles of `block` x `block`. `vertical` ascends, `slash` (distances i - j) descends.
//
// A slash s crosses the block as the band of keys [end - s - block, end - s), end = (iq + 1) block, moved right to key
// 0 where it starts before it. Bands that overlap or lie less than a block apart join: a range grows by whole blocks.
// Slash 0 is always kept. A column is listed where no range holds it and a later range begins behind it.
// Calls tile(start) for every tile of `block` keys and column(j), both ascending; at most slashes + 1 tiles.
template <class OnTile, class OnColumn>
SLK_LAYOUT_HD void vertical_slash_row(int64_t iq, int64_t block, const int32_t* vertical, int64_t verticals,
                                      const int32_t* slash, int64_t slashes, OnTile&& tile, OnColumn&& column) {
  const int64_t end = (iq + 1) * block;
  int64_t v = 0, s = 0;
  while (s < slashes && slash[s] >= end) ++s;
  // The end of the band of the s-th slash; behind the list comes slash 0.
  const auto band_end = [&](int64_t at) {
    const int64_t distance = at < slashes && slash[at] > 0 ? slash[at] : 0;
    return end - distance > block ? end - distance : block;
  };
  while (true) {
    const int64_t range_begin = band_end(s) - block;
    int64_t range_end = range_begin + block;
    for (; s <= slashes; ++s) {  // one past the list: slash 0
      const int64_t next = band_end(s);
      if (next > range_end + block) break;
      if (next > range_end) range_end += block;
    }
    for (; v < verticals && vertical[v] < range_end; ++v) {
      const bool repeated = v > 0 && vertical[v] == vertical[v - 1];
      if (vertical[v] >= 0 && vertical[v] < range_begin && !repeated) column(int64_t(vertical[v]));
    }
    for (int64_t start = range_begin; start < range_end; start += block) tile(start);
    if (s > slashes) return;
  }
}

}  // namespace slk
