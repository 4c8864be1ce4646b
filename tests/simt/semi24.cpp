// The packing kernels of family `semi24`, thread by thread, against the contract written out and the CPU's functions.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>

#include "project_check.h"
#include "simt/runtime.h"
#include "slkernels/semi24.cuh"
#include "slkernels/semi24_cuda.h"

using namespace slk;
using namespace project_check;

namespace {

using Bytes = std::vector<uint8_t>;
constexpr Layout24 kLayouts[] = {Layout24::plain, Layout24::sm80, Layout24::sm90};

// ---- the contract ---------------------------------------------------------------------------------------------------

// A dense matrix; elements outside are zeros.
template <class T>
struct Matrix24 {
  int64_t n, m;
  std::vector<T> at;
  T operator()(int64_t i, int64_t j) const { return i < n && j < m ? at[i * m + j] : rounded(0.0f, false, 0, T()); }
};

template <class T>
float magnitude(T x) {
  const float a = std::fabs(number(x));
  return a <= 0x1p124f ? a : 0x1p124f;  // NaN too
}
// NaN above infinity, equal among themselves.
template <class T>
double rank(T x) {
  const double a = std::fabs(double(number(x)));
  return a != a ? INFINITY : a == INFINITY ? 1e300 : a;
}

// The sum of a transposable pattern, in the tree that semi24.cuh gives it; -1 if it is none.
float pattern_sum(int word, const float (&w)[4][4]) {
  int columns[4] = {};
  for (int r = 0; r < 4; ++r) {
    const int row = word >> 4 * r & 15;
    if (__builtin_popcount(row) != 2) return -1;
    for (int c = 0; c < 4; ++c) columns[c] += row >> c & 1;
  }
  for (int c = 0; c < 4; ++c)
    if (columns[c] != 2) return -1;
  const auto lowest = [](int bits) { return __builtin_ctz(bits); };
  const auto highest = [](int bits) { return 31 - __builtin_clz(bits); };
  const int a = word & 15, b = word >> 4 & 15, c = word >> 8 & 15, d = word >> 12 & 15;
  const auto pair = [&](int above, int below, int x, int y) { return w[above][x] + w[below][y]; };
  const auto both = [&](int above, int x) { return pair(above, above + 1, x, x); };
  if (a == b) return (both(0, lowest(a)) + both(2, lowest(c))) + (both(0, highest(a)) + both(2, highest(c)));
  if ((a & b) == 0) {
    const auto half = [&](int above, int u, int v) {
      return pair(above, above + 1, lowest(u), lowest(v)) + pair(above, above + 1, highest(u), highest(v));
    };
    return half(0, a, b) + half(2, c, d);
  }
  const int common = a & b, missing = c & d;
  return (pair(0, 1, lowest(a & ~b), lowest(b & ~a)) + pair(2, 3, lowest(c & ~d), lowest(d & ~c))) +
         (both(0, lowest(common)) + both(2, lowest(missing)));
}

const std::vector<int>& patterns() {
  static const std::vector<int> all = [] {
    std::vector<int> words;
    const float zeros[4][4] = {};
    for (int word = 0; word < 1 << 16; ++word)
      if (pattern_sum(word, zeros) == 0) words.push_back(word);
    expect(words.size() == 90, "90 patterns");
    return words;
  }();
  return all;
}

// What a tile keeps, bit 4 r + c.
template <class T>
int prune_tile(const Matrix24<T>& score, int64_t i, int64_t j, Prune24 by) {
  int word = 0;
  if (by == Prune24::rows) {
    for (int r = 0; r < 4; ++r) {
      std::array<int, 4> order = {0, 1, 2, 3};
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return rank(score(i + r, j + a)) > rank(score(i + r, j + b)); });
      word |= (1 << order[0] | 1 << order[1]) << 4 * r;
    }
    return word;
  }
  float w[4][4], most = -1;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) w[r][c] = magnitude(score(i + r, j + c));
  for (const int other : patterns()) most = std::max(most, pattern_sum(other, w));
  word = best24<int>(w);
  expect(pattern_sum(word, w) == most, "the best pattern");
  return word;
}

template <class T>
Bytes prune(const Matrix24<T>& score, Prune24 by) {
  Bytes mask(score.n * score.m);
  for (int64_t i = 0; i < score.n; i += 4)
    for (int64_t j = 0; j < score.m; j += 4) {
      const int word = prune_tile(score, i, j, by);
      for (int r = 0; r < 4 && i + r < score.n; ++r)
        for (int c = 0; c < 4 && j + c < score.m; ++c) mask[(i + r) * score.m + j + c] = word >> (4 * r + c) & 1;
    }
  return mask;
}

// A pack on the host, padding as it has to be.
template <class T>
struct HostPack {
  std::vector<T> values;
  Bytes meta;
  Layout24 layout;
  int64_t n, m;
  HostPack(Layout24 layout, int64_t n, int64_t m) : layout(layout), n(n), m(m) {
    const Packed24 shape = {nullptr, nullptr, layout, n, m};
    values.assign(shape.rows() * shape.row_values(), rounded(0.0f, false, 0, T()));
    meta.assign(shape.meta_bytes(), 0x44);
  }
  Packed24 view() { return {values.data(), meta.data(), layout, n, m}; }
};

// Two slots of a group of which the bits of `kept` are kept: those, then padding, then others, from the lowest.
std::array<int, 2> slots_of(int kept, int width) {
  std::vector<int> slots;
  for (int pass = 0; pass < 3; ++pass)
    for (int k = 0; k < 4; ++k) {
      const int kind = kept >> k & 1 ? 0 : k >= width ? 1 : 2;
      if (kind == pass && slots.size() < 2) slots.push_back(k);
    }
  return {std::min(slots[0], slots[1]), std::max(slots[0], slots[1])};
}

template <class T>
HostPack<T> pack(const Matrix24<T>& w, const Bytes& mask, Layout24 layout) {
  HostPack<T> plain(Layout24::plain, w.n, w.m);
  const int64_t groups = groups24(w.m);
  for (int64_t i = 0; i < w.n; ++i)
    for (int64_t g = 0; g < groups; ++g) {
      const int width = int(std::min<int64_t>(4, w.m - 4 * g));
      int kept = 0;
      for (int k = 0; k < width; ++k) kept |= mask[i * w.m + 4 * g + k] << k;
      const auto slots = slots_of(kept, width);
      for (int s = 0; s < 2; ++s)
        if (kept >> slots[s] & 1) plain.values[(i * groups + g) * 2 + s] = w(i, 4 * g + slots[s]);
      uint8_t& byte = plain.meta[i * ceil_div(w.m, 8) + g / 2];
      const int code = slots[0] | slots[1] << 2;
      byte = uint8_t(g % 2 ? (byte & 0x0f) | code << 4 : (byte & 0xf0) | code);
    }
  if (layout == Layout24::plain) return plain;
  HostPack<T> packed(layout, w.n, w.m);
  cpu::convert24(sizeof(T), plain.view(), packed.view(), {0, w.n});
  return packed;
}

// The mask of W_t's pack: of the kept elements of each column, the two largest of every four rows.
template <class T>
Bytes prune_again(const Matrix24<T>& score, const Bytes& mask) {
  Bytes again(mask.size());
  for (int64_t j = 0; j < score.m; ++j)
    for (int64_t i = 0; i < score.n; i += 4) {
      std::vector<int64_t> kept;
      for (int64_t r = i; r < std::min(i + 4, score.n); ++r)
        if (mask[r * score.m + j]) kept.push_back(r);
      std::stable_sort(kept.begin(), kept.end(),
                       [&](int64_t a, int64_t b) { return rank(score(a, j)) > rank(score(b, j)); });
      for (size_t k = 0; k < kept.size() && k < 2; ++k) again[j * score.n + kept[k]] = 1;
    }
  return again;
}
template <class T>
Matrix24<T> transposed(const Matrix24<T>& w) {
  Matrix24<T> t = {w.m, w.n, std::vector<T>(w.at.size())};
  for (int64_t i = 0; i < w.n; ++i)
    for (int64_t j = 0; j < w.m; ++j) t.at[j * w.n + i] = w.at[i * w.m + j];
  return t;
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

// A pack in device memory, which starts as what no kernel writes.
template <class T>
struct DevicePack {
  simt::Buffer<T> values;
  simt::Buffer<uint8_t> meta;
  Layout24 layout;
  int64_t n, m;
  DevicePack(Layout24 layout, int64_t n, int64_t m)
      : values(HostPack<T>(layout, n, m).values.size()),
        meta(HostPack<T>(layout, n, m).meta.size()),
        layout(layout),
        n(n),
        m(m) {}
  explicit DevicePack(const HostPack<T>& host)
      : values(host.values), meta(host.meta), layout(host.layout), n(host.n), m(host.m) {}
  Packed24 view() const { return {values.get(), meta.get(), layout, n, m}; }
  bool equals(const HostPack<T>& host) const { return same(values.host(), host.values) && meta.host() == host.meta; }
};

// The matrix in device memory, `offset` elements from a multiple of 16 bytes.
template <class T>
struct DeviceMatrix {
  simt::Buffer<T> data;
  int offset;
  DeviceMatrix(const std::vector<T>& host, int offset) : data(host.size() + offset), offset(offset) {
    for (size_t i = 0; i < host.size(); ++i) data[offset + i] = host[i];
  }
  const T* get() const { return data.get() + offset; }
};

bool fits(Layout24 layout, size_t bytes) {
  return layout == Layout24::plain || bytes == 2;
}

template <class T>
Matrix24<T> random_matrix(int64_t n, int64_t m, int seed, bool ties) {
  Matrix24<T> w = {n, m, draw<T>(n * m, seed)};
  for (size_t i = 0; i < w.at.size(); ++i) {
    if (ties) w.at[i] = rounded(std::nearbyint(number(w.at[i])), false, 0, T());
    if ((uint32_t(i) * 2654435761u >> 16) % (ties ? 5 : 97) == 3)
      w.at[i] = rounded(i % 2 ? NAN : -INFINITY, false, 0, T());
  }
  return w;
}

// offset: in elements, of W and score.
template <class T>
void check_prune(int64_t n, int64_t m, int offset, bool ties) {
  const Matrix24<T> w = random_matrix<T>(n, m, 1, ties), other = random_matrix<T>(n, m, 2, ties);
  const DeviceMatrix<T> device_w(w.at, offset), device_score(other.at, offset);
  for (const Prune24 by : {Prune24::rows, Prune24::transposable})
    for (const bool scored : {false, true}) {
      const Matrix24<T>& score = scored ? other : w;
      const Bytes mask = prune(score, by), mask_t = prune_again(score, mask);
      simt::Buffer<uint8_t> got(n * m);
      cuda::launch_prune24(type_of(T()), scored ? device_score.get() : device_w.get(), n, m, by, got.get(), nullptr);
      expect(got.host() == mask, "prune24");
      for (const Layout24 layout : kLayouts) {
        if (!fits(layout, sizeof(T))) continue;
        DevicePack<T> to(layout, n, m), to_t(layout, m, n);
        cuda::launch_prune_compress24(type_of(T()), device_w.get(), scored ? device_score.get() : nullptr, by,
                                      to.view(), to_t.view(), nullptr);
        expect(to.equals(pack(w, mask, layout)), "prune_compress24: W's pack");
        expect(to_t.equals(pack(transposed(w), mask_t, layout)), "prune_compress24: W_t's pack");
      }
    }
}

template <class T>
void check_moves(int64_t n, int64_t m, int offset) {
  const Matrix24<T> w = random_matrix<T>(n, m, 3, false);
  const Bytes mask = prune(w, Prune24::rows), mask_t = prune_again(w, mask);
  const DeviceMatrix<T> device_w(w.at, offset);
  const simt::Buffer<uint8_t> device_mask(mask);
  simt::Buffer<int64_t> first(1);
  Matrix24<T> kept = w;
  for (size_t i = 0; i < mask.size(); ++i)
    if (!mask[i]) kept.at[i] = rounded(0.0f, false, 0, T());

  for (const Layout24 layout : kLayouts) {
    if (!fits(layout, sizeof(T))) continue;
    const HostPack<T> want = pack(w, mask, layout);
    DevicePack<T> to(layout, n, m);
    cuda::launch_compress24(type_of(T()), device_w.get(), device_mask.get(), to.view(), nullptr);
    expect(to.equals(want), "compress24");
    cuda::launch_check24(to.view(), first.get(), nullptr);
    expect(first[0] == -1, "check24 of good codes");

    const DevicePack<T> from(want);
    DeviceMatrix<T> dense(std::vector<T>(n * m), offset);
    cuda::launch_decompress24(sizeof(T), from.view(), dense.data.get() + offset, nullptr);
    expect(std::equal(kept.at.begin(), kept.at.end(), dense.get(), [](T a, T b) { return same_bits(a, b); }),
           "decompress24");
    simt::Buffer<uint8_t> bits(n * m);
    cuda::launch_mask_of24(from.view(), bits.get(), nullptr);
    expect(bits.host() == mask, "mask_of24");
    for (const Layout24 target : kLayouts) {
      if (!fits(target, sizeof(T))) continue;
      DevicePack<T> there(target, n, m);
      cuda::launch_convert24(sizeof(T), from.view(), there.view(), nullptr);
      expect(there.equals(pack(w, mask, target)), "convert24");
    }
  }

  // The transposed pack from new values.
  const HostPack<T> packed = pack(w, mask, Layout24::plain), packed_t = pack(transposed(w), mask_t, Layout24::plain);
  const DevicePack<T> device(packed);
  DevicePack<T> device_t(packed_t);
  simt::Buffer<int32_t> perm(packed_t.values.size());
  cuda::launch_repack24_perm(device.view(), device_t.view(), perm.get(), nullptr);
  std::vector<T> repacked(packed_t.values.size());
  for (size_t i = 0; i < repacked.size(); ++i) {
    expect(perm[i] >= -1 && perm[i] < int64_t(packed.values.size()), "positions in values");
    repacked[i] = perm[i] < 0 ? rounded(0.0f, false, 0, T()) : packed.values[perm[i]];
  }
  expect(same(repacked, packed_t.values), "repack24_perm");
  perm[0] = int32_t(packed.values.size());
  repacked[0] = rounded(0.0f, false, 0, T());
  simt::Buffer<T> values_t(repacked.size());
  cuda::launch_repack24_t(sizeof(T), device.values.get(), int64_t(packed.values.size()), perm.get(),
                          int64_t(repacked.size()), values_t.get(), nullptr);
  expect(same(values_t.host(), repacked), "repack24_t_");
}

// Masks and codes that are not 2:4: found, the first of them, and packed as NaN.
template <class T>
void check_faults(int64_t n, int64_t m) {
  const Matrix24<T> w = random_matrix<T>(n, m, 4, false);
  const simt::Buffer<T> device_w(w.at);
  simt::Buffer<int64_t> first(1);
  const Bytes mask = prune(w, Prune24::rows);
  for (const int64_t fault : {n * m - 1, n * m / 2, int64_t(0)}) {
    Bytes bad = mask;
    bad[fault] ^= 1;
    for (int64_t i = fault + 40; i < n * m; i += 40) bad[i] ^= 1;
    HostPack<T> want(Layout24::plain, n, m);
    const int64_t group = cpu::compress24(type_of(T()), w.at.data(), bad.data(), want.view(), {0, n});
    const simt::Buffer<uint8_t> device_bad(bad);
    cuda::launch_check_mask24(device_bad.get(), n, m, first.get(), nullptr);
    expect(first[0] == group, "the first group of a mask that is not 2:4");
    DevicePack<T> to(Layout24::plain, n, m);
    cuda::launch_compress24(type_of(T()), device_w.get(), device_bad.get(), to.view(), nullptr);
    expect(to.equals(want), "compress24 of a mask that is not 2:4");
  }
  for (const Layout24 layout : kLayouts) {
    if (!fits(layout, sizeof(T))) continue;
    HostPack<T> packed = pack(w, mask, layout);
    packed.meta[packed.meta.size() / 2] ^= 0x0f;
    packed.meta[packed.meta.size() / 3] ^= 0x01;
    cuda::launch_check24(DevicePack<T>(packed).view(), first.get(), nullptr);
    expect(first[0] == cpu::check24(packed.view(), {0, n}), "the first code that is none of the six");
  }
}

template <class T>
void check_type() {
  // Blocks inside of W, at its edges, and both; rows at multiples of 16 bytes, or not.
  const int64_t sizes[][2] = {{128, 128}, {130, 136}, {1, 1}, {3, 5}, {37, 61}, {66, 200}, {200, 7}};
  for (const auto& [n, m] : sizes) {
    check_prune<T>(n, m, 0, n % 2 == 0);
    check_moves<T>(n, m, 0);
  }
  check_prune<T>(64, 64, 1, true);
  check_moves<T>(64, 64, 1);
  check_faults<T>(9, 30);
  check_faults<T>(5, 64);
}

}  // namespace

int main() {
  check_type<__nv_bfloat16>();
  check_type<__half>();
  check_type<float>();
  return finish("semi24");
}
