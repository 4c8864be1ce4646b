// As sm90_cases.cuh, for the wrappers that sm_80 has (and stmatrix): one warp, bits in, bits out.
#pragma once

#include <vector>

#include "slkernels/ptx/cp_async.h"
#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma.h"
#include "slkernels/ptx/mma_sp.h"
#include "sm90_cases.cuh"

namespace sm80 {

using namespace slk;

// Every form of ldmatrix on 32 rows of 8 elements: out [14 registers, 32 lanes].
constexpr int kLdmatrixIn = 32 * 4, kLdmatrixOut = 14 * 32;
static __global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* rows = cuda::dynamic_shared<uint32_t>();
  const int lane = int(threadIdx.x);
  for (int i = lane; i < kLdmatrixIn; i += 32) rows[i] = in[i];
  __syncthreads();
  const uint32_t* row = rows + 4 * lane;
  uint32_t x1[1], x2[2], x4[4], t1[1], t2[2], t4[4];
  ptx::ldmatrix_x1(x1, row);
  ptx::ldmatrix_x2(x2, row);
  ptx::ldmatrix_x4(x4, row);
  ptx::ldmatrix_x1_trans(t1, row);
  ptx::ldmatrix_x2_trans(t2, row);
  ptx::ldmatrix_x4_trans(t4, row);
  const uint32_t all[] = {x1[0], x2[0], x2[1], x4[0], x4[1], x4[2], x4[3],
                          t1[0], t2[0], t2[1], t4[0], t4[1], t4[2], t4[3]};
  for (int i = 0; i < 14; ++i) out[32 * i + lane] = all[i];
}

// Every form of stmatrix: in [4 registers, 32 lanes], out the shared memory of each, 7 matrices.
constexpr int kStmatrixIn = 4 * 32, kStmatrixOut = 7 * 32;
static __global__ void stmatrix_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* rows = cuda::dynamic_shared<uint32_t>();
  const int lane = int(threadIdx.x);
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[32 * i + lane];
  // Lanes beyond the matrices' rows give an address that is not used.
  ptx::stmatrix_x1(rows + 4 * (lane % 8), {r[0]});
  ptx::stmatrix_x2(rows + 32 + 4 * (lane % 16), {r[0], r[1]});
  ptx::stmatrix_x4(rows + 96 + 4 * lane, r);
  __syncthreads();
  for (int i = lane; i < kStmatrixOut; i += 32) out[i] = rows[i];
}

// cp.async of 16, 8 and 4 bytes, the latter parts of which are cut to a number that grows with the lane.
constexpr int kCopyIn = 3 * 32 * 4, kCopyOut = 3 * 32 * 4;
static __global__ void copy_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* to = cuda::dynamic_shared<uint32_t>();
  const int lane = int(threadIdx.x);
  for (int i = lane; i < kCopyOut; i += 32) to[i] = 0x5a5a5a5a;
  __syncthreads();
  ptx::cp_async_16(to + 4 * lane, in + 4 * lane, lane % 17);
  ptx::commit_group();
  ptx::cp_async_8(to + 128 + 4 * lane, in + 128 + 4 * lane, lane % 9);
  ptx::cp_async_4(to + 256 + 4 * lane, in + 256 + 4 * lane, lane % 5);
  ptx::commit_group();
  ptx::wait_group<0>();
  __syncthreads();
  for (int i = lane; i < kCopyOut; i += 32) out[i] = to[i];
}

// in: a [4, 32], b [2, 32], d [4, 32]; out: d of the three types, [3, 4, 32].
constexpr int kMmaIn = 10 * 32, kMmaOut = 12 * 32;
static __global__ void mma_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[2];
  float d[3][4];
  for (int i = 0; i < 4; ++i) a[i] = in[32 * i + lane];
  for (int i = 0; i < 2; ++i) b[i] = in[32 * (4 + i) + lane];
  for (int i = 0; i < 12; ++i) d[i / 4][i % 4] = __uint_as_float(in[32 * (6 + i % 4) + lane]);
  ptx::mma_m16n8k16_bf16(d[0], a, b);
  ptx::mma_m16n8k16_f16(d[1], a, b);
  ptx::mma_m16n8k8_tf32(d[2], a, b);
  for (int i = 0; i < 12; ++i) out[32 * i + lane] = __float_as_uint(d[i / 4][i % 4]);
}

// in: a [4, 32], b [4, 32], d [4, 32], metadata [32]; out: d of the two types and selectors, [4, 4, 32].
constexpr int kMmaSpIn = 13 * 32, kMmaSpOut = 16 * 32;
static __global__ void mma_sp_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[4];
  float d[4][4];
  for (int i = 0; i < 4; ++i) a[i] = in[32 * i + lane];
  for (int i = 0; i < 4; ++i) b[i] = in[32 * (4 + i) + lane];
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = __uint_as_float(in[32 * (8 + i % 4) + lane]);
  const uint32_t meta = in[32 * 12 + lane];
  ptx::mma_sp_m16n8k32_bf16<0>(d[0], a, b, meta);
  ptx::mma_sp_m16n8k32_bf16<1>(d[1], a, b, meta);
  ptx::mma_sp_m16n8k32_f16<0>(d[2], a, b, meta);
  ptx::mma_sp_m16n8k32_f16<1>(d[3], a, b, meta);
  for (int i = 0; i < 16; ++i) out[32 * i + lane] = __float_as_uint(d[i / 4][i % 4]);
}

inline std::vector<uint32_t> run(void (*kernel)(const uint32_t*, uint32_t*), const std::vector<uint32_t>& in,
                                 int out_words) {
  sm90::DeviceArray<uint32_t> in_device(in), out(out_words);
  sm90::check(cuda::launch(kernel, 1, 32, 2048, nullptr, in_device.get(), out.get()), "sm_80 kernel");
  return out.host();
}

}  // namespace sm80
