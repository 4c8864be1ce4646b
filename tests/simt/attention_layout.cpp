// The CUDA builders of BlockRows against the CPU's, thread by thread: the same lists, bitmaps and columns.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "simt/runtime.h"
#include "slkernels/attention_layout.h"

using namespace slk;

namespace {

int failures = 0;
std::mt19937 rng(5);

int draw(int low, int high) {  // both included
  return std::uniform_int_distribution<int>(low, high)(rng);
}

void expect(bool ok, const std::string& what, const Tiling& t) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s M=%ld N=%ld Sq=%ld Sk=%ld\n", what.c_str(), long(t.M), long(t.N), long(t.Sq), long(t.Sk));
}

// The lists and bitmaps of one device.
struct HostLists {
  std::vector<int32_t> ptr, cnt, nmask, idx, id;
  std::vector<uint32_t> bits;
  RowLists lists;
  TileBits tiles;

  HostLists(int64_t rows, int64_t width, int64_t bit_words, int64_t per_row)
      : ptr(rows), cnt(rows), nmask(rows), idx(rows * width), id(rows * width), bits(bit_words) {
    lists = {ptr.data(), cnt.data(), nmask.data(), idx.data(), rows, width};
    tiles = {id.data(), bits.data(), per_row};
  }
};
struct DeviceLists {
  simt::Buffer<int32_t> ptr, cnt, nmask, idx, id;
  simt::Buffer<uint32_t> bits;
  RowLists lists;
  TileBits tiles;

  explicit DeviceLists(const HostLists& like)
      : ptr(like.ptr.size()),
        cnt(like.ptr.size()),
        nmask(like.ptr.size()),
        idx(like.idx.size()),
        id(like.id.size()),
        bits(like.bits.size()) {
    lists = {ptr.get(), cnt.get(), nmask.get(), idx.get(), like.lists.rows, like.lists.width};
    tiles = {id.get(), bits.get(), like.tiles.per_row};
  }
};

// What a kernel ever reads of both is equal; `tile_words` words a bitmap, 0: there are none.
void compare(const std::string& what, const Tiling& t, const HostLists& want, const DeviceLists& got,
             int64_t tile_words) {
  const auto idx = got.idx.host(), id = got.id.host();
  const auto bits = got.bits.host();
  bool same = got.ptr.host() == want.ptr && got.cnt.host() == want.cnt && got.nmask.host() == want.nmask;
  for (size_t r = 0; same && r < want.ptr.size(); ++r)
    for (int32_t n = 0; n < want.cnt[r]; ++n) {
      const int64_t e = want.ptr[r] + n;
      same &= idx[e] == want.idx[e];
      if (!tile_words) continue;
      same &= id[e] == want.id[e];
      for (int64_t w = 0; same && id[e] >= 0 && w < tile_words; ++w)
        same &= bits[id[e] * tile_words + w] == want.bits[id[e] * tile_words + w];
    }
  expect(same, what, t);
}

template <class T>
simt::Buffer<T> device(const std::vector<T>& host) {
  return simt::Buffer<T>(host);
}
const bool* bools(const uint8_t* bytes) {
  return reinterpret_cast<const bool*>(bytes);
}

void compare_transpose(const Tiling& t, int64_t groups, const HostLists& want, const DeviceLists& got, bool bitmaps) {
  const int64_t columns = groups * t.k_blocks(), capacity = int64_t(want.idx.size());
  BlockRows in = {};
  in.rows = {want.ptr.data(), want.cnt.data(), want.nmask.data(), want.idx.data(), bitmaps ? want.id.data() : nullptr,
             capacity,        t.q_blocks()};
  in.batches = 1;
  in.heads = groups;
  in.block_n = in.unit = t.N;
  std::vector<int32_t> ptr(columns), cnt(columns), nmask(columns), idx(capacity), id(capacity);
  cpu::layout_transpose(in, {ptr.data(), cnt.data(), nmask.data(), idx.data(), bitmaps ? id.data() : nullptr},
                        t.k_blocks());
  in.rows.ptr = got.ptr.get();
  in.rows.cnt = got.cnt.get();
  in.rows.nmask = got.nmask.get();
  in.rows.idx = got.idx.get();
  in.rows.bit_id = bitmaps ? got.id.get() : nullptr;
  simt::Buffer<int32_t> d_ptr(columns), d_cnt(columns), d_nmask(columns), d_idx(capacity), d_id(capacity),
      slots(groups * t.q_blocks() * t.k_blocks());
  const cudaError_t error = cuda::launch_layout_transpose(
      in, {d_ptr.get(), d_cnt.get(), d_nmask.get(), d_idx.get(), bitmaps ? d_id.get() : nullptr}, t.k_blocks(),
      slots.get(), nullptr);
  bool same = error == cudaSuccess && d_ptr.host() == ptr && d_cnt.host() == cnt && d_nmask.host() == nmask;
  const auto got_idx = d_idx.host(), got_id = d_id.host();
  for (int64_t c = 0; same && c < columns; ++c)
    for (int64_t e = ptr[c]; e < ptr[c] + cnt[c]; ++e) same &= got_idx[e] == idx[e] && (!bitmaps || got_id[e] == id[e]);
  expect(same, "transpose", t);
}

void all_builders(const Tiling& t) {
  constexpr int64_t kGroups = 3;
  const int64_t rows = kGroups * t.q_blocks(), k_blocks = t.k_blocks(), tile_words = t.M * (t.N / 32);
  for (bool causal : {false, true}) {
    std::vector<uint8_t> mask(rows * k_blocks);
    for (uint8_t& m : mask) m = draw(0, 1);
    const auto d_mask = device(mask);
    HostLists want(rows, k_blocks, 0, 0);
    DeviceLists got(want);
    cpu::layout_block_mask({t, causal, bools(mask.data())}, want.lists, {0, rows});
    cuda::launch_layout_block_mask({t, causal, bools(d_mask.get())}, got.lists, nullptr);
    compare("block_mask", t, want, got, 0);
    compare_transpose(t, kGroups, want, got, false);

    const int64_t k = 5;
    std::vector<int32_t> chosen(rows * k);
    for (int32_t& j : chosen) j = draw(-1, int(k_blocks) - 1);
    const auto d_chosen = device(chosen);
    HostLists want_topk(rows, std::min(k, k_blocks), 0, 0);
    DeviceLists got_topk(want_topk);
    cpu::layout_topk({t, causal, chosen.data(), k}, want_topk.lists, {0, rows});
    cuda::launch_layout_topk({t, causal, d_chosen.get(), k}, got_topk.lists, nullptr);
    compare("topk", t, want_topk, got_topk, 0);
  }

  for (int64_t sink : {0, 70}) {
    std::vector<int32_t> lo(kGroups * t.Sq), hi(lo.size());
    for (size_t i = 0; i < lo.size(); ++i) {
      lo[i] = i % 5 ? draw(-10, int(t.Sk)) : 0;
      hi[i] = lo[i] + draw(-5, 200);
    }
    const auto d_lo = device(lo), d_hi = device(hi);
    HostLists want(rows, k_blocks, 0, 0);
    DeviceLists got(want);
    cpu::layout_interval({t, lo.data(), hi.data(), sink}, want.lists, {0, rows});
    cuda::launch_layout_interval({t, d_lo.get(), d_hi.get(), sink}, got.lists, nullptr);
    compare("interval", t, want, got, 0);
  }

  {
    std::vector<uint8_t> mask(kGroups * t.Sq * t.Sk);
    for (size_t e = 0; e < mask.size(); ++e) {  // full, empty and mixed tiles
      const int64_t i = int64_t(e) / t.Sk % t.Sq / t.M, j = int64_t(e) % t.Sk / t.N;
      mask[e] = (i + j) % 3 == 0 || ((i + j) % 3 == 1 && draw(0, 1));
    }
    const auto d_mask = device(mask);
    HostLists want(rows, k_blocks, rows * k_blocks * tile_words, k_blocks);
    DeviceLists got(want);
    simt::Buffer<uint8_t> kinds(rows * k_blocks);
    cpu::layout_dense_mask({t, bools(mask.data())}, want.lists, want.tiles, {0, rows});
    cuda::launch_layout_dense_mask({t, bools(d_mask.get())}, got.lists, got.tiles, kinds.get(), nullptr);
    compare("dense_mask", t, want, got, tile_words);
    compare_transpose(t, kGroups, want, got, true);
  }

  if (t.Sk > t.Sq) {
    std::vector<int32_t> parent(kGroups * t.Sq), prefix(kGroups);
    for (size_t i = 0; i < parent.size(); ++i) parent[i] = draw(-1, int(int64_t(i) % t.Sq) - 1);
    for (int32_t& p : prefix) p = draw(0, int(t.Sk - t.Sq));
    const auto d_parent = device(parent), d_prefix = device(prefix);
    const int64_t per_row = ceil_div(t.Sq, t.N) + 1;
    HostLists want(rows, k_blocks, rows * per_row * tile_words, per_row);
    DeviceLists got(want);
    cpu::layout_tree({t, parent.data(), prefix.data()}, want.lists, want.tiles, {0, rows});
    cuda::launch_layout_tree({t, d_parent.get(), d_prefix.get()}, got.lists, got.tiles, nullptr);
    compare("tree", t, want, got, tile_words);
  }
}

void cu_seqlens(bool causal) {
  const std::vector<int32_t> cu_q = {0, 100, 100, 101, 130}, cu_k = {0, 40, 90, 200, 210};
  const int64_t Sq = 150;
  std::vector<int32_t> lo(Sq), hi(Sq);
  cpu::layout_cu_seqlens({cu_q.data(), cu_k.data(), 4, Sq, causal, lo.data(), hi.data()});
  const auto d_q = device(cu_q), d_k = device(cu_k);
  simt::Buffer<int32_t> d_lo(Sq), d_hi(Sq);
  cuda::launch_layout_cu_seqlens({d_q.get(), d_k.get(), 4, Sq, causal, d_lo.get(), d_hi.get()}, nullptr);
  expect(d_lo.host() == lo && d_hi.host() == hi, "cu_seqlens", {});
}

void vertical_slash(int64_t S, int64_t block, int64_t verticals, int64_t slashes) {
  constexpr int64_t kGroups = 2;
  const Tiling t = {block, block, S, S};
  const int64_t rows = kGroups * t.q_blocks();
  std::vector<int32_t> vertical(kGroups * verticals), slash(kGroups * slashes);
  for (auto* list : {&vertical, &slash})
    for (int32_t& at : *list) at = draw(0, int(S) - 1);
  for (int64_t g = 0; g < kGroups; ++g) {
    std::sort(vertical.begin() + g * verticals, vertical.begin() + (g + 1) * verticals);
    std::sort(slash.begin() + g * slashes, slash.begin() + (g + 1) * slashes, std::greater<>());
  }
  const auto d_vertical = device(vertical), d_slash = device(slash);
  HostLists want(rows, slashes + 1, 0, 0);
  DeviceLists got(want);
  std::vector<int32_t> col_ptr(rows + 1), col_idx(rows * verticals);
  simt::Buffer<int32_t> d_col_ptr(rows + 1), d_col_idx(rows * verticals);
  cpu::layout_vertical_slash(
      {block, S, vertical.data(), slash.data(), verticals, slashes, col_ptr.data(), col_idx.data()}, want.lists);
  cuda::launch_layout_vertical_slash(
      {block, S, d_vertical.get(), d_slash.get(), verticals, slashes, d_col_ptr.get(), d_col_idx.get()}, got.lists,
      nullptr);
  compare("vertical_slash", t, want, got, 0);
  auto columns = d_col_idx.host();
  bool same = d_col_ptr.host() == col_ptr;
  for (int64_t e = 0; same && e < col_ptr[rows]; ++e) same &= columns[e] == col_idx[e];
  expect(same, "vertical_slash columns", t);
}

// Indices that lie outside are skipped, and nothing outside is touched: the harness would say so.
void corrupt() {
  const Tiling t = {64, 64, 100, 130};
  const std::vector<int32_t> wild = {-7, 3, 1 << 30, 1, -1, 2};
  const auto d_wild = device(wild);
  const std::vector<int32_t> tame = {-1, -1, -1, 1, -1, 2};
  HostLists want(2, 3, 0, 0);
  DeviceLists got(want);
  cpu::layout_topk({t, false, tame.data(), 3}, want.lists, {0, 2});
  cuda::launch_layout_topk({t, false, d_wild.get(), 3}, got.lists, nullptr);
  compare("topk, corrupt", t, want, got, 0);

  // More tiles than a slot holds: the row is marked, its neighbour is not.
  const std::vector<int32_t> lo(t.Sq, 0);
  std::vector<int32_t> hi(t.Sq, 64);
  hi[3] = 65;
  const auto d_lo = device(lo), d_hi = device(hi);
  DeviceLists narrow(HostLists(2, 1, 0, 0));
  cuda::launch_layout_interval({t, d_lo.get(), d_hi.get(), 0}, narrow.lists, nullptr);
  const std::vector<int32_t> marked = {-1, 1};
  expect(narrow.cnt.host() == marked && narrow.idx.host()[1] == 0, "a row that does not fit", t);

  const std::vector<int32_t> ptr = {-5, 4, 6, 1 << 30}, cnt = {3, 100, 2, 7}, nmask = {9, -1, 1, 0},
                             idx = {0, 1, 2, -9, 1 << 30, 2, 5, 1};
  const auto d_ptr = device(ptr), d_cnt = device(cnt), d_nmask = device(nmask), d_idx = device(idx);
  BlockRows in = {};
  in.rows = {d_ptr.get(), d_cnt.get(), d_nmask.get(), d_idx.get(), nullptr, int64_t(idx.size()), 2};
  in.batches = 2;
  in.heads = 1;
  in.block_n = in.unit = 64;
  simt::Buffer<int32_t> t_ptr(6), t_cnt(6), t_nmask(6), t_idx(idx.size()), slots(12);
  cuda::launch_layout_transpose(in, {t_ptr.get(), t_cnt.get(), t_nmask.get(), t_idx.get(), nullptr}, 3, slots.get(),
                                nullptr);

  const std::vector<int32_t> parent(100, 99), prefix = {1 << 30};  // cycles, and keys far behind the last
  const auto d_parent = device(parent), d_prefix = device(prefix);
  HostLists shape(2, 3, 2 * 3 * 128, 3);
  DeviceLists tree(shape);
  cuda::launch_layout_tree({t, d_parent.get(), d_prefix.get()}, tree.lists, tree.tiles, nullptr);
}

}  // namespace

int main() {
  const int64_t blocks[][2] = {{64, 64}, {128, 64}, {64, 128}}, sizes[][2] = {{1, 1}, {129, 300}, {200, 63}};
  for (const auto& [M, N] : blocks)
    for (const auto& [Sq, Sk] : sizes) all_builders({M, N, Sq, Sk});
  all_builders({64, 64, 70, 64 * 40});  // more than 32 tiles a row
  cu_seqlens(false);
  cu_seqlens(true);
  vertical_slash(300, 64, 20, 4);
  vertical_slash(521, 128, 3, 0);
  vertical_slash(65, 64, 0, 3);
  vertical_slash(64 * 40, 64, 30, 30);
  corrupt();
  std::printf(failures ? "%d failures\n" : "attention_layout: ok\n", failures);
  return failures ? 1 : 0;
}
