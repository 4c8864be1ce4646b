// Planted faults of the sm_90a wrappers: a small warp-specialised GEMM, and each thing that one can forget in it.
// Without the fault it is sound, and all of them share that twin.
#include <cuda_bf16.h>

#include <cstring>
#include <vector>

#include "faults.h"
#include "sm90_cases.cuh"

using namespace slk;
using sm90::DeviceArray;

namespace {

// One tile, C[64, 64] = A[64, K] B[64, K]^T in fp32, with a ring of two stages.
constexpr int kTile = 64, kStages = 2, kSteps = 5, kK = kTile * kSteps;
constexpr uint32_t kStageBytes = 2 * kTile * kTile * 2;

enum Fault : int {
  none,
  no_wgmma_wait,
  wgmma_wait_after_use,
  no_first_wgmma_fence,
  no_wgmma_fence_after_touch,
  touched_in_flight,
  no_wgmma_commit,
  no_store_fence,
  no_store_commit,
  no_store_wait,
  staging_rewritten,
  no_full_wait,
  no_empty_arrival,
  no_expect_arrival,
  too_many_arrivals,
  expects_too_much,
  expects_too_little,
  early_empty_arrival,
  one_warp_speaks_for_all,
  no_empty_wait,
  wrong_consumer_parity,
  wrong_producer_parity,
  wrong_descriptor_swizzle,
  wrong_descriptor_stride,
  descriptor_outside,
  warps_disagree,
  half_a_warpgroup,
  no_init_fence,
  no_init_barrier,
  uninitialised,
  initialised_twice,
  load_never_awaited,
  unaligned_tile,
};

struct Shared {
  __nv_bfloat16 a[kStages][kTile][kTile], b[kStages][kTile][kTile];
  float c[kTile][32];  // half of the columns at a time
  uint64_t full[kStages], empty[kStages];
};

__device__ void produce(Shared& s, const CUtensorMap* a, const CUtensorMap* b, Fault fault) {
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const uint32_t parity = uint32_t(step / kStages) & 1;
    if (fault != no_empty_wait)
      ptx::mbarrier_wait(&s.empty[stage], fault == wrong_producer_parity ? parity : parity ^ 1);
    const uint32_t bytes = fault == expects_too_much     ? kStageBytes + 16
                           : fault == expects_too_little ? kStageBytes - 16
                                                         : kStageBytes;
    if (fault != no_expect_arrival) ptx::mbarrier_arrive_expect_tx(&s.full[stage], bytes);
    if (fault == too_many_arrivals) ptx::mbarrier_arrive(&s.full[stage]);
    char* to = reinterpret_cast<char*>(s.a[stage]) + (fault == unaligned_tile ? 64 : 0);
    ptx::tma_load_2d(to, a, &s.full[stage], step * kTile, 0);
    ptx::tma_load_2d(s.b[stage], b, &s.full[stage], step * kTile, 0);
  }
  if (fault == load_never_awaited) {  // a sixth stage, for nobody
    const int stage = kSteps % kStages;
    ptx::mbarrier_wait(&s.empty[stage], (kSteps / kStages & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(&s.full[stage], 2 * kStageBytes);
    ptx::tma_load_2d(s.a[stage], a, &s.full[stage], 0, 0);
    ptx::tma_load_2d(s.b[stage], b, &s.full[stage], 0, 0);
  }
}

__device__ void multiply(float (&sum)[kTile / 2], Shared& s, int stage, bool first, Fault fault) {
  const ptx::Swizzle swizzle = fault == wrong_descriptor_swizzle ? ptx::Swizzle::bytes64 : ptx::Swizzle::bytes128;
  const uint32_t rows8 = fault == wrong_descriptor_stride ? 512 : 1024;
  const int warp = int(threadIdx.x) / 32;
  uint64_t a = ptx::matrix_descriptor(s.a[stage], swizzle, rows8);
  const uint64_t b = ptx::matrix_descriptor(s.b[stage], swizzle, fault == descriptor_outside ? 32768 : rows8);
  if (fault == warps_disagree) a = ptx::advance(a, 1024 * uint32_t(warp));
  if (fault != no_first_wgmma_fence && (fault != no_wgmma_fence_after_touch || first)) ptx::wgmma_fence();
  for (int k = 0; k < kTile; k += 16)
    ptx::wgmma_bf16<kTile>(sum, ptx::advance(a, 2 * k), ptx::advance(b, 2 * k), !first || k > 0);
  if (fault == touched_in_flight) sum[3] = 0;
  if (fault != no_wgmma_commit) ptx::wgmma_commit();
}

__device__ void store(const float (&sum)[kTile / 2], Shared& s, const CUtensorMap* c, Fault fault) {
  const int thread = int(threadIdx.x), row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && thread == 0 && fault != staging_rewritten && fault != no_store_wait) ptx::tma_store_wait_read<0>();
    ptx::named_barrier_sync(1, 128);
    for (int i = 0; i < kTile / 4; ++i)
      s.c[row + 8 * (i / 2 % 2)][column + 8 * (i / 4) + i % 2] = sum[half * (kTile / 4) + i];
    if (fault != no_store_fence) ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, 128);
    if (thread == 0) {
      ptx::tma_store_2d(c, s.c, 32 * half, 0);
      if (fault != no_store_commit) ptx::tma_store_commit();
    }
    if (fault == no_store_wait) return;
  }
  if (thread == 0) ptx::tma_store_wait_read<0>();
}

__device__ void consume(Shared& s, const CUtensorMap* c, Fault fault) {
  if (fault == half_a_warpgroup && threadIdx.x >= 64) return;
  const bool speaks = fault == one_warp_speaks_for_all ? threadIdx.x == 0 : threadIdx.x % 32 == 0;
  float sum[kTile / 2];
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const uint32_t parity = uint32_t(step / kStages) & 1;
    if (fault != no_full_wait) ptx::mbarrier_wait(&s.full[stage], fault == wrong_consumer_parity ? parity ^ 1 : parity);
    multiply(sum, s, stage, step == 0, fault);
    const bool release = speaks && fault != no_empty_arrival;
    if (fault == early_empty_arrival && release) ptx::mbarrier_arrive(&s.empty[stage]);
    if (fault != no_wgmma_wait && (fault != wgmma_wait_after_use || step + 1 < kSteps)) ptx::wgmma_wait<0>();
    if (fault == no_wgmma_fence_after_touch && step == 1)
      for (float& x : sum) x *= 2;
    if (fault != early_empty_arrival && release) ptx::mbarrier_arrive(&s.empty[stage]);
  }
  store(sum, s, c, fault);
  if (fault == wgmma_wait_after_use) ptx::wgmma_wait<0>();
}

__global__ void __launch_bounds__(256, 1)
    faulty_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                  const __grid_constant__ CUtensorMap c, Fault fault) {
  Shared& s = *cuda::dynamic_shared<Shared>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      if (fault != uninitialised) ptx::mbarrier_init(&s.full[stage], 1);
      ptx::mbarrier_init(&s.empty[stage], fault == one_warp_speaks_for_all ? 1 : 4);
      if (fault == initialised_twice) ptx::mbarrier_init(&s.empty[stage], 4);
    }
    if (fault != no_init_fence) ptx::fence_mbarrier_init();
  }
  if (fault != no_init_barrier) __syncthreads();
  if (threadIdx.x < 128)
    consume(s, &c, fault);
  else if (threadIdx.x < 160 && ptx::elect_one())
    produce(s, &a, &b, fault);
}

bool product_is_right(Fault fault) {
  std::vector<uint16_t> a(kTile * kK), b(kTile * kK);
  const auto value = [](size_t i) { return float(int(i * 2654435761u >> 7 & 7) - 3); };
  const auto bits = [](float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return uint16_t(u >> 16);
  };
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = bits(value(i));
    b[i] = bits(value(i + 12345));
  }
  DeviceArray<uint16_t> a_device(a), b_device(b);
  DeviceArray<float> c(kTile * kTile);
  const auto operand = [](const void* base) {
    return cuda::TensorMap<2>{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base, {kK, kTile}, {2, kK * 2}, {kTile, kTile},
                              CU_TENSOR_MAP_SWIZZLE_128B};
  };
  CUtensorMap a_map, b_map, c_map;
  sm90::check(cuda::encode(operand(a_device.get()), &a_map), "map of A");
  sm90::check(cuda::encode(operand(b_device.get()), &b_map), "map of B");
  sm90::check(cuda::encode(cuda::TensorMap<2>{CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                                              c.get(),
                                              {kTile, kTile},
                                              {4, kTile * 4},
                                              {32, kTile},
                                              CU_TENSOR_MAP_SWIZZLE_NONE},
                           &c_map),
              "map of C");
  // A warpgroup of consumers and one for the producer, of which a thread works: wgmma wants whole warpgroups.
  sm90::check(cudaFuncSetAttribute(faulty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))),
              "shared memory");
  sm90::check(cuda::launch(faulty_kernel, 1, 256, sizeof(Shared), nullptr, a_map, b_map, c_map, fault), "launch");
  const std::vector<float> got = c.host();
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) {
      float want = 0;
      for (int k = 0; k < kK; ++k) want += value(size_t(i) * kK + k) * value(size_t(j) * kK + k + 12345);
      if (got[i * kTile + j] != want) return false;
    }
  return true;
}

template <Fault fault>
bool run(bool planted) {
  return product_is_right(planted ? fault : none);
}

const faults::Fault table[] = {
    {"no_wgmma_wait", "the thread ends with wgmma in flight", run<no_wgmma_wait>},
    {"wgmma_wait_after_use", "differs from the reference", run<wgmma_wait_after_use>},
    {"no_first_wgmma_fence", "missing wgmma.fence before the first wgmma", run<no_first_wgmma_fence>},
    {"no_wgmma_fence_after_touch", "missing wgmma.fence: the accumulators were written",
     run<no_wgmma_fence_after_touch>},
    {"touched_in_flight", "accumulators were written while", run<touched_in_flight>},
    {"no_wgmma_commit", "wgmma.commit_group never committed", run<no_wgmma_commit>},
    {"no_store_fence", "missing fence.proxy.async", run<no_store_fence>},
    {"no_store_commit", "cp.async.bulk.commit_group never committed", run<no_store_commit>},
    {"no_store_wait", "the thread ends with a TMA store in flight", run<no_store_wait>},
    {"staging_rewritten", "race on dynamic shared memory", run<staging_rewritten>},
    {"no_full_wait", "dynamic shared memory", run<no_full_wait>},
    {"no_empty_arrival", "deadlock: no thread of the block can go on", run<no_empty_arrival>},
    {"no_expect_arrival", "mbarrier at dynamic shared memory + ", run<no_expect_arrival>},
    {"too_many_arrivals", "arrival count underflow", run<too_many_arrivals>},
    {"expects_too_much", "16 bytes expected", run<expects_too_much>},
    {"expects_too_little", "transaction count underflow: 16 bytes more", run<expects_too_little>},
    {"early_empty_arrival", "race on dynamic shared memory", run<early_empty_arrival>},
    {"one_warp_speaks_for_all", "race on dynamic shared memory", run<one_warp_speaks_for_all>},
    {"no_empty_wait", "dynamic shared memory", run<no_empty_wait>},
    {"wrong_consumer_parity", "dynamic shared memory", run<wrong_consumer_parity>},
    {"wrong_producer_parity", "deadlock: no thread of the block can go on", run<wrong_producer_parity>},
    {"wrong_descriptor_swizzle", "differs from the reference", run<wrong_descriptor_swizzle>},
    {"wrong_descriptor_stride", "differs from the reference", run<wrong_descriptor_stride>},
    {"descriptor_outside", "past the ", run<descriptor_outside>},
    {"warps_disagree", "gives other operands than the first warp", run<warps_disagree>},
    {"half_a_warpgroup", "not all warps of the warpgroup have issued", run<half_a_warpgroup>},
    {"no_init_fence", "missing fence.mbarrier_init", run<no_init_fence>},
    {"no_init_barrier", "dynamic shared memory + 409", run<no_init_barrier>},
    {"uninitialised", "wait on an uninitialised mbarrier", run<uninitialised>},
    {"initialised_twice", "mbarrier.init of a live mbarrier", run<initialised_twice>},
    {"load_never_awaited", "transaction count", run<load_never_awaited>},
    {"unaligned_tile", "is not 128-byte aligned", run<unaligned_tile>},
};

}  // namespace

int main(int argc, char** argv) {
  return faults::main(argc, argv, table);
}
