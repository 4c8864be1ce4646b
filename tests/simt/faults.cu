// Planted faults: what the harness must report in code for sm_80. See faults.h.
#include "faults.h"

#include <cuda_bf16.h>

#include <cmath>
#include <vector>

#include "slkernels/ptx/cp_async.h"
#include "slkernels/ptx/ldmatrix.h"
#include "slkernels/ptx/mma.h"

using namespace slk;

namespace {

constexpr int kThreads = 128;
constexpr uint32_t kWarp = 0xffffffffu;

// Runs kernel(planted, in, out) in one block on in = 0, 1, 2, ... and compares out with expected(i).
template <class Expected>
bool run(void (*kernel)(bool, const float*, float*), bool planted, const Expected& expected, int threads = kThreads,
         size_t shared_bytes = 0) {
  std::vector<float> numbers(4 * threads);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = float(i);
  simt::Buffer<float> in(numbers), out(threads);
  cuda::launch(kernel, dim3(1), dim3(threads), shared_bytes, nullptr, planted, in.get(), out.get());
  for (int i = 0; i < threads; ++i)
    if (out[i] != float(expected(i))) return false;
  return true;
}

__device__ int next() {
  return (threadIdx.x + 1) % blockDim.x;
}

// What out[i] should be.
int itself(int i) {
  return i;
}
int next_of(int i) {
  return (i + 1) % kThreads;
}
int three_times_next(int i) {
  return 3 * next_of(i);
}
int six_times_next(int i) {
  return 6 * next_of(i);
}
int neighbour(int i) {
  return i ^ 1;
}
int first_of_four(int i) {
  return 4 * i;
}
int thread_count(int) {
  return kThreads;
}

// ---- barriers

__global__ void missing_syncthreads(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];
  if (!planted) __syncthreads();
  out[threadIdx.x] = tile[next()];
}

__global__ void missing_syncwarp(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];
  if (!planted) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void missing_second_barrier(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int pass = 0; pass < 3; ++pass) {
    tile[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    sum += tile[next()];
    if (!planted) __syncthreads();  // the next pass writes what others may still read
  }
  out[threadIdx.x] = sum;
}

__global__ void different_barriers(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (planted && threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 0;
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = tile[next()];
}

__global__ void barrier_of_some(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!planted || threadIdx.x < 64) __syncthreads();
  __syncthreads();
  out[threadIdx.x] = tile[next()];
}

__global__ void early_exit(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads];
  out[threadIdx.x] = tile[threadIdx.x] = in[threadIdx.x];
  if (planted && threadIdx.x >= 100) return;
  __syncthreads();
  out[threadIdx.x] = tile[next()];
}

// ---- warps

__global__ void divergent_shuffle(bool planted, const float* in, float* out) {
  const float mine = in[threadIdx.x];
  float other = mine;
  if (!planted || threadIdx.x % 32 < 16) other = __shfl_xor_sync(kWarp, mine, 1);
  out[threadIdx.x] = other;
}

__global__ void different_collectives(bool planted, const float* in, float* out) {
  float other = in[threadIdx.x];
  if (planted && threadIdx.x % 32 == 7)
    other = float(__ballot_sync(kWarp, 1));
  else
    other = __shfl_xor_sync(kWarp, other, 1);
  out[threadIdx.x] = other;
}

__global__ void lane_outside_mask(bool planted, const float* in, float* out) {
  const uint32_t mask = planted ? 0x0000ffffu : kWarp;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);
}

// The result of a call that returns a struct, stored at once: instrumentation of the store depends on inlining.
__global__ void stored_shuffle(bool planted, const float* in, float* out) {
  __shared__ __nv_bfloat162 tile[kThreads];
  tile[threadIdx.x] = __nv_bfloat162();
  __syncthreads();
  tile[threadIdx.x] = __shfl_xor_sync(kWarp, __float2bfloat162_rn(in[threadIdx.x]), 1);
  if (!planted) __syncthreads();
  out[threadIdx.x] = __low2float(tile[threadIdx.x ^ 1]);
}

// ---- memory

__global__ void read_beyond(bool planted, const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + (planted ? 3 * blockDim.x + 1 : 0)];
}

__global__ void write_beyond(bool planted, const float* in, float* out) {
  out[threadIdx.x + planted] = in[threadIdx.x];
}

__global__ void unwritten_shared(bool planted, const float* in, float* out) {
  __shared__ float tile[kThreads + 1];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = planted ? tile[threadIdx.x + 1] : tile[next()];
}

__global__ void dynamic_overrun(bool planted, const float* in, float* out) {
  float* tile = cuda::dynamic_shared<float>();  // [kThreads]
  tile[threadIdx.x + planted] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[next()];
}

__global__ void misaligned_vector(bool planted, const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x - (planted && threadIdx.x ? 1 : 0));
  out[threadIdx.x] = v.x;
}

__global__ void atomic_and_plain(bool planted, const float*, float* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (!planted) __syncthreads();
  out[threadIdx.x] = float(count);
}

// ---- cp.async

__global__ void missing_wait(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads];
  ptx::cp_async_4(&tile[threadIdx.x], &in[threadIdx.x]);
  ptx::commit_group();
  if (!planted) ptx::wait_group<0>();
  __syncthreads();
  out[threadIdx.x] = tile[next()];
  ptx::wait_all();
}

__global__ void wait_without_barrier(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads];
  tile[threadIdx.x] = 0;
  __syncthreads();
  ptx::cp_async_4(&tile[threadIdx.x], &in[threadIdx.x]);
  ptx::commit_group();
  if (planted) __syncthreads();
  ptx::wait_all();
  if (!planted) __syncthreads();
  out[threadIdx.x] = tile[next()];
}

// A ring of three stages that waits for one group too few.
__global__ void short_wait(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float ring[3][kThreads];
  float sum = 0;
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_4(&ring[stage][threadIdx.x], &in[threadIdx.x]);
    ptx::commit_group();
  }
  for (int step = 0; step < 6; ++step) {
    if (planted)
      ptx::wait_group<2>();
    else
      ptx::wait_group<1>();
    __syncthreads();
    ptx::cp_async_4(&ring[(step + 2) % 3][threadIdx.x], &in[threadIdx.x]);
    ptx::commit_group();
    sum += ring[step % 3][next()];
  }
  ptx::wait_all();
  out[threadIdx.x] = sum;
}

// A ring whose slot is filled again before all have read it.
__global__ void refill_before_barrier(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads];
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    ptx::cp_async_4(&tile[threadIdx.x], &in[threadIdx.x]);
    ptx::wait_all();
    __syncthreads();
    sum += tile[next()];
    if (!planted) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void never_waited(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads];
  ptx::cp_async_4(&tile[threadIdx.x], &in[threadIdx.x]);
  ptx::commit_group();
  if (!planted) ptx::wait_group<0>();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void copy_beyond(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads][4];
  const bool last = threadIdx.x == blockDim.x - 1;
  ptx::cp_async_16(tile[threadIdx.x], in + 4 * threadIdx.x + (planted && last ? 4 : 0), last ? 4 : 16);
  ptx::wait_all();
  out[threadIdx.x] = tile[threadIdx.x][0];
}

__global__ void misaligned_copy(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[kThreads][4];
  ptx::cp_async_16(tile[threadIdx.x], in + 4 * threadIdx.x - (planted && threadIdx.x ? 1 : 0));
  ptx::wait_all();
  out[threadIdx.x] = tile[threadIdx.x][0];
}

// ---- fragments: C[16, 8] = A[16, 16] B[8, 16]^T by one warp

enum class Wrong { nothing, a_registers, b_registers, row_address, transposed };

template <Wrong wrong>
__global__ void small_product(bool planted, const float* in, float* out) {
  __shared__ __align__(16) __nv_bfloat16 a[16][16], b[8][16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a[i / 16][i % 16] = __nv_bfloat16(in[i % 97]);
  for (int i = lane; i < 128; i += 32) b[i / 16][i % 16] = __nv_bfloat16(in[i % 13]);
  __syncwarp();
  uint32_t fa[4], fb[2];
  const bool row_wrong = planted && wrong == Wrong::row_address;
  ptx::ldmatrix_x4(fa, &a[row_wrong ? lane / 2 : lane % 16][row_wrong ? lane % 2 * 8 : lane / 16 * 8]);
  if (planted && wrong == Wrong::transposed)
    ptx::ldmatrix_x2_trans(fb, &b[lane % 8][lane / 8 % 2 * 8]);
  else
    ptx::ldmatrix_x2(fb, &b[lane % 8][lane / 8 % 2 * 8]);
  if (planted && wrong == Wrong::a_registers) {
    const uint32_t second = fa[1];
    fa[1] = fa[2];
    fa[2] = second;
  }
  if (planted && wrong == Wrong::b_registers) {
    const uint32_t first = fb[0];
    fb[0] = fb[1];
    fb[1] = first;
  }
  float d[4] = {};
  ptx::mma_m16n8k16_bf16(d, fa, fb);
  const int row = lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}

template <Wrong wrong>
bool product_is_right(bool planted) {
  std::vector<float> numbers(97);
  for (int i = 0; i < 97; ++i) numbers[i] = float(i);
  simt::Buffer<float> in(numbers), out(128);
  cuda::launch(small_product<wrong>, dim3(1), dim3(32), 0, nullptr, planted, in.get(), out.get());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float sum = 0;  // whole numbers below 2^24: exact in any order
      for (int k = 0; k < 16; ++k) sum += numbers[(row * 16 + k) % 97] * numbers[(column * 16 + k) % 13];
      if (out[row * 8 + column] != sum) return false;
    }
  return true;
}

__global__ void misaligned_row(bool planted, const float* in, float* out) {
  __shared__ __align__(16) float tile[40];
  tile[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x < 8) tile[32 + threadIdx.x] = 0;
  __syncwarp();
  uint32_t d[1];
  ptx::ldmatrix_x1(d, &tile[4 * (threadIdx.x % 8) + planted]);
  out[threadIdx.x] = __uint_as_float(d[0]);
}

// ---- launches

__global__ void plain_copy(bool, const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
}
bool unasked_shared(bool planted) {
  const size_t bytes = 64 << 10;
  if (!planted) cudaFuncSetAttribute(plain_copy, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  return run(plain_copy, planted, itself, kThreads, bytes);
}

template <auto kernel, auto expected>
bool gives(bool planted) {
  return run(kernel, planted, expected);
}

const faults::Fault table[] = {
    {"missing_syncthreads", "race on static shared memory", gives<missing_syncthreads, next_of>},
    {"missing_syncwarp", "race on static shared memory", gives<missing_syncwarp, neighbour>},
    {"missing_second_barrier", "race on static shared memory", gives<missing_second_barrier, three_times_next>},
    {"different_barriers", "is at the __syncthreads", gives<different_barriers, next_of>},
    {"barrier_of_some", "is at the __syncthreads", gives<barrier_of_some, next_of>},
    {"early_exit", "28 of 128 threads have ended", gives<early_exit, next_of>},
    {"divergent_shuffle", "__shfl_xor_sync", gives<divergent_shuffle, neighbour>},
    {"different_collectives", "divergence: lane", gives<different_collectives, neighbour>},
    {"lane_outside_mask", "the calling lane is not in its mask", gives<lane_outside_mask, neighbour>},
    {"stored_shuffle", "race on static shared memory", gives<stored_shuffle, itself>},
    {"read_beyond", "read of 4 bytes out of bounds", gives<read_beyond, itself>},
    {"write_beyond", "write of 4 bytes out of bounds", gives<write_beyond, itself>},
    {"unwritten_shared", "which nobody has written", gives<unwritten_shared, next_of>},
    {"dynamic_overrun", "past the 512 bytes of dynamic shared memory",
     [](bool planted) { return run(dynamic_overrun, planted, next_of, kThreads, kThreads * sizeof(float)); }},
    {"misaligned_vector", "misaligned", gives<misaligned_vector, first_of_four>},
    {"atomic_and_plain", "atomic", gives<atomic_and_plain, thread_count>},
    {"missing_wait", "which nobody has written", gives<missing_wait, next_of>},
    {"wait_without_barrier", "race on static shared memory", gives<wait_without_barrier, next_of>},
    {"short_wait", "which nobody has written", gives<short_wait, six_times_next>},
    {"refill_before_barrier", "race on static shared memory", gives<refill_before_barrier, three_times_next>},
    {"never_waited", "ends without waiting for its cp.async", gives<never_waited, itself>},
    {"copy_beyond", "out of bounds", gives<copy_beyond, first_of_four>},
    {"misaligned_copy", "the source of a 16-byte copy is misaligned", gives<misaligned_copy, first_of_four>},
    {"a_registers", "differs from the reference", product_is_right<Wrong::a_registers>},
    {"b_registers", "differs from the reference", product_is_right<Wrong::b_registers>},
    {"row_address", "differs from the reference", product_is_right<Wrong::row_address>},
    {"transposed", "differs from the reference", product_is_right<Wrong::transposed>},
    {"misaligned_row", "the row's address is not 16-byte aligned",
     [](bool planted) { return run(misaligned_row, planted, [](int i) { return i; }, 32); }},
    {"unasked_shared", "more than cudaFuncSetAttribute has asked for", unasked_shared},
};

}  // namespace

int main(int argc, char** argv) {
  return faults::main(argc, argv, table);
}
