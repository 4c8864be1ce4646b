// One small kernel for each group of sm_90a wrappers, and a host function that runs it: what the harness' unit tests
// (ptx_sm90.cpp) hold to the manual, and what the conformance run (conformance.cu) records on a GPU.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "slkernels/launch.cuh"
#include "slkernels/ptx/fence.h"
#include "slkernels/ptx/mbarrier.h"
#include "slkernels/ptx/tma.h"
#include "slkernels/ptx/warp.h"
#include "slkernels/ptx/wgmma.h"
#include "slkernels/tensor_map.h"

namespace sm90 {

using namespace slk;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Device memory with a host copy of its beginning.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : size_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  std::vector<T> host() const {
    check(cudaDeviceSynchronize(), "kernel");
    std::vector<T> copy(size_);
    check(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

struct At {
  int x, y, z;
};

// ---- TMA: a tile in, its bytes out as they lie in shared memory; and a tile out

template <int kRank>
__global__ void __launch_bounds__(128, 1)
    load_kernel(const __grid_constant__ CUtensorMap map, At at, uint32_t bytes, uint32_t* out) {
  uint32_t* tile = cuda::dynamic_shared<uint32_t>();
  uint64_t* bar = reinterpret_cast<uint64_t*>(tile + bytes / 4);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&map);
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, bytes);
    if constexpr (kRank == 2) ptx::tma_load_2d(tile, &map, bar, at.x, at.y);
    if constexpr (kRank == 3) ptx::tma_load_3d(tile, &map, bar, at.x, at.y, at.z);
  }
  ptx::mbarrier_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = tile[i];
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_inval(bar);
}

template <int kRank>
__global__ void __launch_bounds__(128, 1)
    store_kernel(const __grid_constant__ CUtensorMap map, At at, uint32_t bytes, const uint32_t* in) {
  uint32_t* tile = cuda::dynamic_shared<uint32_t>();
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) tile[i] = in[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kRank == 2) ptx::tma_store_2d(&map, tile, at.x, at.y);
    if constexpr (kRank == 3) ptx::tma_store_3d(&map, tile, at.x, at.y, at.z);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

template <int kRank>
uint32_t tile_bytes(const cuda::TensorMap<kRank>& tensor) {
  uint32_t bytes = uint32_t(tensor.stride[0]);
  for (uint32_t b : tensor.box) bytes *= b;
  return bytes;
}

// The tile of `tensor` at `at`, as TMA lays it out.
template <int kRank>
std::vector<uint32_t> load_tile(const cuda::TensorMap<kRank>& tensor, At at) {
  CUtensorMap map;
  check(cuda::encode(tensor, &map), "tensor map");
  const uint32_t bytes = tile_bytes(tensor);
  DeviceArray<uint32_t> out(bytes / 4);
  check(cuda::launch(load_kernel<kRank>, 1, 128, bytes + 8, nullptr, map, at, bytes, out.get()), "load_kernel");
  return out.host();
}

// Writes `tile`, laid out as TMA does, to `tensor` at `at`.
template <int kRank>
void store_tile(const cuda::TensorMap<kRank>& tensor, At at, const std::vector<uint32_t>& tile) {
  CUtensorMap map;
  check(cuda::encode(tensor, &map), "tensor map");
  DeviceArray<uint32_t> in(tile);
  check(
      cuda::launch(store_kernel<kRank>, 1, 128, tile.size() * 4, nullptr, map, at, uint32_t(tile.size() * 4), in.get()),
      "store_kernel");
  check(cudaDeviceSynchronize(), "store_kernel");
}

// ---- wgmma: D[64, N] = A[64, K] B[N, K]^T, the accumulators out register by register

// Values of K in a row of the swizzle.
constexpr int row_values(ptx::Swizzle s) {
  return s == ptx::Swizzle::bytes128 ? 64 : s == ptx::Swizzle::bytes64 ? 32 : 16;
}
constexpr CUtensorMapSwizzle map_swizzle(ptx::Swizzle s) {
  return s == ptx::Swizzle::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : s == ptx::Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : s == ptx::Swizzle::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                      : CU_TENSOR_MAP_SWIZZLE_NONE;
}

// Without a swizzle, blocks of 8 rows by 16 bytes: TMA loads columns of 8 values, one after the other.
template <int N, ptx::Swizzle kSwizzle>
__global__ void __launch_bounds__(128, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* out) {
  constexpr int kK = row_values(kSwizzle), kRow = 2 * kK;
  constexpr bool kPlain = kSwizzle == ptx::Swizzle::none;
  char* a = cuda::dynamic_shared<char>();
  char* b = a + 64 * kRow;
  uint64_t* bar = reinterpret_cast<uint64_t*>(b + N * kRow);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, (64 + N) * kRow);
    if constexpr (kPlain) {
      for (int k = 0; k < kK; k += 8) {
        ptx::tma_load_2d(a + k / 8 * 64 * 16, &a_map, bar, k, 0);
        ptx::tma_load_2d(b + k / 8 * N * 16, &b_map, bar, k, 0);
      }
    } else {
      ptx::tma_load_2d(a, &a_map, bar, 0, 0);
      ptx::tma_load_2d(b, &b_map, bar, 0, 0);
    }
  }
  ptx::mbarrier_wait(bar, 0);
  constexpr uint32_t kRows8 = kPlain ? 128 : 8 * kRow;
  const uint64_t a_at = ptx::matrix_descriptor(a, kSwizzle, kRows8, kPlain ? 64 * 16 : 16);
  const uint64_t b_at = ptx::matrix_descriptor(b, kSwizzle, kRows8, kPlain ? N * 16 : 16);
  float sum[N / 2];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK; k += 16) ptx::wgmma_bf16<N>(sum, ptx::advance(a_at, 2 * k), ptx::advance(b_at, 2 * k), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(sum);
  for (int i = 0; i < N / 2; ++i) out[int(threadIdx.x) * (N / 2) + i] = sum[i];
}

inline cuda::TensorMap<2> rows_map(const uint16_t* base, int rows, int k, ptx::Swizzle swizzle) {
  const uint32_t box = swizzle == ptx::Swizzle::none ? 8 : uint32_t(k);
  return {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
          base,
          {uint64_t(k), uint64_t(rows)},
          {2, uint64_t(k) * 2},
          {box, uint32_t(rows)},
          map_swizzle(swizzle)};
}

// a [64, K], b [N, K] in bf16's bits, K = row_values(swizzle); the result is [128 threads, N / 2 registers].
inline std::vector<float> multiply(int n, ptx::Swizzle swizzle, void (*kernel)(CUtensorMap, CUtensorMap, float*),
                                   const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  const int k = row_values(swizzle);
  DeviceArray<uint16_t> a_device(a), b_device(b);
  CUtensorMap a_map, b_map;
  check(cuda::encode(rows_map(a_device.get(), 64, k, swizzle), &a_map), "map of A");
  check(cuda::encode(rows_map(b_device.get(), n, k, swizzle), &b_map), "map of B");
  DeviceArray<float> out(size_t(128) * n / 2);
  const size_t shared_bytes = size_t(64 + n) * k * 2 + 8;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory");
  check(cuda::launch(kernel, 1, 128, shared_bytes, nullptr, a_map, b_map, out.get()), "wgmma_kernel");
  return out.host();
}
template <int N, ptx::Swizzle kSwizzle>
std::vector<float> multiply(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
  return multiply(N, kSwizzle, wgmma_kernel<N, kSwizzle>, a, b);
}

// ---- wgmma with A in registers: D[64, N] = A[64, 16] B[16, N], B row-major, of which TMA brings panels of 64 columns

enum class Half { bf16, f16 };

template <int N, Half kType>
__global__ void __launch_bounds__(128, 1)
    wgmma_registers_kernel(const uint32_t* a, const __grid_constant__ CUtensorMap b_map, float* out) {
  constexpr int kPanel = 16 * 128;  // bytes
  char* b = cuda::dynamic_shared<char>();
  uint64_t* bar = reinterpret_cast<uint64_t*>(b + N / 64 * kPanel);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(bar, N / 64 * kPanel);
    for (int panel = 0; panel < N / 64; ++panel) ptx::tma_load_2d(b + panel * kPanel, &b_map, bar, panel * 64, 0);
  }
  ptx::mbarrier_wait(bar, 0);
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = a[int(threadIdx.x) * 4 + i];
  const uint64_t b_at = ptx::matrix_descriptor_n_major(b, 1024, kPanel);
  float sum[N / 2];
  ptx::wgmma_fence();
  if constexpr (kType == Half::bf16)
    ptx::wgmma_registers_bf16<N>(sum, fragment, b_at, false);
  else
    ptx::wgmma_registers_f16<N>(sum, fragment, b_at, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(sum);
  for (int i = 0; i < N / 2; ++i) out[int(threadIdx.x) * (N / 2) + i] = sum[i];
}

// a: [128 threads, 4 registers], b [16, N], both in the type's bits; the result is [128 threads, N / 2 registers].
template <int N, Half kType>
std::vector<float> multiply_registers(const std::vector<uint32_t>& a, const std::vector<uint16_t>& b) {
  DeviceArray<uint32_t> a_device(a);
  DeviceArray<uint16_t> b_device(b);
  const cuda::TensorMap<2> tensor = {
      kType == Half::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      b_device.get(),
      {N, 16},
      {2, N * 2},
      {64, 16},
      CU_TENSOR_MAP_SWIZZLE_128B};
  CUtensorMap map;
  check(cuda::encode(tensor, &map), "map of B");
  DeviceArray<float> out(size_t(128) * N / 2);
  check(cuda::launch(wgmma_registers_kernel<N, kType>, 1, 128, size_t(N) * 32 + 8, nullptr, a_device.get(), map,
                     out.get()),
        "wgmma_registers_kernel");
  return out.host();
}

}  // namespace sm90
