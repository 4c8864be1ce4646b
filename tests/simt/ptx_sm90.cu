// The sm_90a wrappers against what the manual says, written down once more and differently. Under the harness this is a
// test of the host bodies; compiled by nvcc for sm_90a, of the hardware.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "sm90_cases.cuh"

using namespace slk;
using sm90::At;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

// ---- mbarrier: three phases of a ring of one, parities alternating; and the phase before the first

__global__ void ring_kernel(int phases, int* out) {
  int* slot = cuda::dynamic_shared<int>();  // [32]
  uint64_t* full = reinterpret_cast<uint64_t*>(slot + 32);
  uint64_t* empty = full + 1;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, 32);
  }
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  for (int p = 0; p < phases; ++p) {
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty, (p & 1) ^ 1);
      slot[lane] = 100 * p + lane;
      ptx::mbarrier_arrive(full);
    } else {
      while (!ptx::mbarrier_try_wait(full, p & 1)) {
      }
      out[p * 32 + lane] = slot[31 - lane];
      ptx::mbarrier_arrive(empty);
    }
  }
}

void test_mbarrier() {
  const int phases = 5;
  sm90::DeviceArray<int> device(phases * 32);
  cuda::launch(ring_kernel, 1, 64, 32 * 4 + 16, nullptr, phases, device.get());
  const std::vector<int> out = device.host();
  for (int p = 0; p < phases; ++p)
    for (int lane = 0; lane < 32; ++lane)
      expect(out[p * 32 + lane] == 100 * p + 31 - lane, "mbarrier ring, phase " + std::to_string(p));
}

// ---- elect.sync and named barriers: warp 0 hands over to warp 1 without stopping, warp 2 takes no part

__global__ void roles_kernel(int* out) {
  int* slot = cuda::dynamic_shared<int>();
  const int warp = int(threadIdx.x) / 32;
  if (warp == 0) {
    if (ptx::elect_one()) *slot = 7;
    __syncwarp();
    ptx::named_barrier_arrive(3, 64);
  } else if (warp == 1) {
    ptx::named_barrier_sync(3, 64);
    out[threadIdx.x - 32] = *slot;
  }
}

void test_roles() {
  sm90::DeviceArray<int> device(32);
  cuda::launch(roles_kernel, 1, 96, 4, nullptr, device.get());
  const std::vector<int> out = device.host();
  for (int i = 0; i < 32; ++i) expect(out[i] == 7, "elect.sync and named barriers");
}

// ---- TMA

// CUDA C++ Programming Guide, "Swizzle": in lines of 128 bytes, whatever the row, 16-byte units change places with
// units of the same 128, 64 or 32 bytes, and line i of 8, 4 or 2 gives which.
size_t swizzled(size_t offset, CUtensorMapSwizzle swizzle) {
  const size_t unit = offset / 16 % 8, line = offset / 128;
  size_t other = unit;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) other = unit ^ line % 8;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) other = unit / 4 * 4 + (unit % 4 ^ line % 4);
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B) other = unit / 2 * 2 + (unit % 2 ^ line % 2);
  return line * 128 + other * 16 + offset % 16;
}

void test_tma_2d(CUtensorMapSwizzle swizzle, uint32_t columns) {
  const int rows = 21, width = 88;  // of 96 columns of memory
  std::vector<uint16_t> host(rows * 96);
  for (size_t i = 0; i < host.size(); ++i) host[i] = uint16_t(i + 1);
  sm90::DeviceArray<uint16_t> device(host);
  const cuda::TensorMap<2> tensor = {
      CU_TENSOR_MAP_DATA_TYPE_UINT16, device.get(), {width, rows}, {2, 96 * 2}, {columns, 16}, swizzle};
  for (const At at : {At{0, 0, 0}, At{40, 8, 0}, At{-5, -3, 0}, At{80, 20, 0}, At{200, 0, 0}}) {
    const std::vector<uint32_t> words = sm90::load_tile(tensor, at);
    std::vector<uint16_t> tile(words.size() * 2);
    std::memcpy(tile.data(), words.data(), words.size() * 4);
    bool same = true;
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < int(columns); ++c) {
        const int y = at.y + r, x = at.x + c;
        const uint16_t want = y >= 0 && y < rows && x >= 0 && x < width ? host[y * 96 + x] : uint16_t(0);
        same &= tile[swizzled((size_t(r) * columns + c) * 2, swizzle) / 2] == want;
      }
    const std::string name =
        "swizzle " + std::to_string(swizzle) + " at " + std::to_string(at.x) + "," + std::to_string(at.y);
    expect(same, "TMA load, " + name);

    // And back, into a tensor of its own.
    sm90::DeviceArray<uint16_t> copy(host.size());
    cuda::TensorMap<2> to = tensor;
    to.base = copy.get();
    sm90::store_tile(to, at, words);
    const std::vector<uint16_t> stored = copy.host();
    same = true;
    for (int y = 0; y < rows; ++y)
      for (int x = 0; x < 96; ++x) {
        const bool inside = x < width && y >= at.y && y < at.y + 16 && x >= at.x && x < at.x + int(columns);
        same &= stored[y * 96 + x] == (inside ? host[y * 96 + x] : uint16_t(0xffff));
      }
    expect(same, "TMA store, " + name);
  }
}

void test_tma_3d() {
  std::vector<float> host(3 * 10 * 8);
  for (size_t i = 0; i < host.size(); ++i) host[i] = float(i + 1);
  sm90::DeviceArray<float> device(host);
  const cuda::TensorMap<3> tensor = {
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, device.get(), {8, 10, 3}, {4, 8 * 4, 80 * 4}, {4, 4, 2},
      CU_TENSOR_MAP_SWIZZLE_NONE};
  const At at = {4, 8, 2};
  const std::vector<uint32_t> words = sm90::load_tile(tensor, at);
  bool same = true;
  for (int z = 0; z < 2; ++z)
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) {
        const bool inside = at.z + z < 3 && at.y + y < 10 && at.x + x < 8;
        float got;
        std::memcpy(&got, &words[(z * 4 + y) * 4 + x], 4);
        same &= got == (inside ? host[(at.z + z) * 80 + (at.y + y) * 8 + at.x + x] : 0.f);
      }
  expect(same, "TMA load of three dimensions");
  sm90::DeviceArray<float> copy(host.size());
  cuda::TensorMap<3> to = tensor;
  to.base = copy.get();
  sm90::store_tile(to, at, words);
  const std::vector<float> stored = copy.host();
  int written = 0;
  for (size_t i = 0; i < stored.size(); ++i) {
    if (std::isnan(stored[i])) continue;
    ++written;
    expect(stored[i] == host[i], "TMA store of three dimensions");
  }
  expect(written == 4 * 2 * 1, "TMA store of three dimensions, clipped");
}

void test_encode() {
  alignas(16) static char base[64];
  const cuda::TensorMap<2> good = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, {64, 64}, {2, 128}, {64, 64},
                                   CU_TENSOR_MAP_SWIZZLE_128B};
  const auto refused = [&](const char* what, auto change) {
    cuda::TensorMap<2> bad = good;
    change(bad);
    CUtensorMap map;
    expect(cuda::encode(bad, &map) != cudaSuccess, std::string("the encoder accepts ") + what);
  };
  CUtensorMap map;
  expect(cuda::encode(good, &map) == cudaSuccess, "the encoder refuses a good map");
  refused("a base that is not 16-byte aligned", [](auto& t) { t.base = base + 8; });
  refused("a stride that is no multiple of 16", [](auto& t) { t.stride[1] = 136; });
  refused("a box above 256", [](auto& t) { t.box[1] = 257; });
  refused("a box of no rows", [](auto& t) { t.box[1] = 0; });
  refused("a row wider than the swizzle", [](auto& t) { t.swizzle = CU_TENSOR_MAP_SWIZZLE_64B; });
  refused("a row that is no multiple of 16 bytes", [](auto& t) { t.box[0] = 12; });
  refused("an empty tensor", [](auto& t) { t.size[0] = 0; });
}

// ---- wgmma

std::vector<uint16_t> small_integers(size_t count, uint32_t seed) {  // in bf16: every sum is exact
  std::mt19937 random(seed);
  std::vector<uint16_t> bits(count);
  for (uint16_t& b : bits) {
    const float f = float(int(random() % 17) - 8);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    b = uint16_t(u >> 16);
  }
  return bits;
}

float number(uint16_t bits) {
  const uint32_t u = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

void test_wgmma(int n, ptx::Swizzle swizzle, void (*kernel)(CUtensorMap, CUtensorMap, float*)) {
  const int kk = sm90::row_values(swizzle);
  const std::vector<uint16_t> a = small_integers(size_t(64) * kk, 1), b = small_integers(size_t(n) * kk, 2);
  const std::vector<float> got = sm90::multiply(n, swizzle, kernel, a, b);
  int wrong = 0;
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < n; ++column) {
      float want = 0;
      for (int k = 0; k < kk; ++k) want += number(a[row * kk + k]) * number(b[column * kk + k]);
      // The inverse of the fragment's formula: who holds (row, column).
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int reg = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      wrong += got[thread * (n / 2) + reg] != want;
    }
  expect(!wrong, "wgmma n=" + std::to_string(n) + " swizzle " + std::to_string(int(swizzle)) + ": " +
                     std::to_string(wrong) + " wrong");
}
template <int N, ptx::Swizzle kSwizzle>
void test_wgmma() {
  test_wgmma(N, kSwizzle, sm90::wgmma_kernel<N, kSwizzle>);
}

// Small integers again, in bf16 and in fp16.
uint16_t bits_of(int number, sm90::Half type) {
  if (type == sm90::Half::bf16) {
    const float f = float(number);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return uint16_t(u >> 16);
  }
  return __half_raw(__float2half_rn(float(number))).x;
}
template <int N, sm90::Half kType>
void test_wgmma_registers() {
  std::mt19937 random(3);
  const auto draw = [&] { return int(random() % 17) - 8; };
  std::vector<int> a(64 * 16), b(16 * N);
  for (int& x : a) x = draw();
  for (int& x : b) x = draw();
  std::vector<uint32_t> fragments(128 * 4);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {  // who holds (row, k), in which register and half
      const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, reg = k / 8 * 2 + row % 16 / 8;
      fragments[thread * 4 + reg] |= uint32_t(bits_of(a[row * 16 + k], kType)) << (16 * (k % 2));
    }
  std::vector<uint16_t> b_bits;
  for (int x : b) b_bits.push_back(bits_of(x, kType));
  const std::vector<float> got = sm90::multiply_registers<N, kType>(fragments, b_bits);
  int wrong = 0;
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < N; ++column) {
      int want = 0;
      for (int k = 0; k < 16; ++k) want += a[row * 16 + k] * b[k * N + column];
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int reg = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      wrong += got[thread * (N / 2) + reg] != float(want);
    }
  expect(!wrong, "wgmma from registers, n=" + std::to_string(N) + ": " + std::to_string(wrong) + " wrong");
}

template <int... kEighths>
void test_all_widths(std::integer_sequence<int, kEighths...>) {
  (test_wgmma<8 * (kEighths + 1), ptx::Swizzle::bytes128>(), ...);
}

}  // namespace

int main() {
  test_mbarrier();
  test_roles();
  test_tma_2d(CU_TENSOR_MAP_SWIZZLE_NONE, 48);
  test_tma_2d(CU_TENSOR_MAP_SWIZZLE_32B, 16);
  test_tma_2d(CU_TENSOR_MAP_SWIZZLE_64B, 32);
  test_tma_2d(CU_TENSOR_MAP_SWIZZLE_128B, 64);
  test_tma_3d();
  test_encode();
  test_all_widths(std::make_integer_sequence<int, 32>());
  test_wgmma<24, ptx::Swizzle::none>();
  test_wgmma<128, ptx::Swizzle::none>();
  test_wgmma<8, ptx::Swizzle::bytes32>();
  test_wgmma<256, ptx::Swizzle::bytes32>();
  test_wgmma<40, ptx::Swizzle::bytes64>();
  test_wgmma<192, ptx::Swizzle::bytes64>();
  test_wgmma_registers<64, sm90::Half::bf16>();
  test_wgmma_registers<128, sm90::Half::f16>();
  test_wgmma_registers<256, sm90::Half::bf16>();
  std::printf(failures ? "%d failures\n" : "ptx_sm90: ok\n", failures);
  return failures ? 1 : 0;
}
