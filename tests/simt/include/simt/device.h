// The words of CUDA C++ that g++ lacks, for code that runs under simt::launch. CUDA C++ Programming Guide, chapter "C++
// Language Extensions"; only what the kernels use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/runtime.h"

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
#define warpSize 32
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __grid_constant__
#define __grid_constant__
#endif

#define SIMT_NOINLINE inline __attribute__((noinline, no_sanitize("thread")))
#define SIMT_HERE __builtin_return_address(0)
// For functions that return a struct: the compiler's instrumentation overlooks the store in `shared[i] = call()`.
#define SIMT_INLINE inline __attribute__((always_inline))

// ---- barriers
// --------------------------------------------------------------------------------------------------------

SIMT_NOINLINE void __syncthreads() {
  simt::block_barrier(0, SIMT_HERE);
}
SIMT_NOINLINE int __syncthreads_count(int predicate) {
  return simt::block_barrier(predicate, SIMT_HERE);
}
SIMT_NOINLINE int __syncthreads_or(int predicate) {
  return simt::block_barrier(predicate, SIMT_HERE) != 0;
}
SIMT_NOINLINE int __syncthreads_and(int predicate) {
  const simt::Dim3 b = simt::block_dim();
  return simt::block_barrier(predicate, SIMT_HERE) == int(b.x * b.y * b.z);
}
SIMT_NOINLINE void __syncwarp(uint32_t mask = 0xffffffffu) {
  simt::warp_collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, true, SIMT_HERE);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes
// ----------------------------------------------------------------------------------------------

namespace simt {
struct Shuffle {
  uint64_t value;
  int source;  // lane to read from, or -1: keep the own value
  uint64_t result;
};
inline void run_shuffle(void* const* lanes, uint32_t mask) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Shuffle& s = *static_cast<Shuffle*>(lanes[lane]);
    if (s.source < 0) {
      s.result = s.value;
    } else {
      // The value of a lane that does not take part is undefined: give what no test can take for a result.
      s.result = mask >> s.source & 1 ? static_cast<Shuffle*>(lanes[s.source])->value : 0xdeadbeefdeadbeefu;
    }
  }
}
SIMT_NOINLINE uint64_t shuffle_bits(const char* kind, uint32_t mask, uint64_t value, int source) {
  Shuffle s = {value, source, 0};
  warp_collective(kind, mask, &s, run_shuffle, false, SIMT_HERE);
  return s.result;
}
template <class T>
SIMT_INLINE T shuffle(const char* kind, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(kind, mask, bits, source);
  T result;
  std::memcpy(static_cast<void*>(&result), &bits, sizeof(T));
  return result;
}
struct Vote {
  bool predicate;
  uint32_t ballot;
};
inline void run_vote(void* const* lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1 && static_cast<Vote*>(lanes[lane])->predicate) ballot |= 1u << lane;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->ballot = ballot;
}
inline uint32_t vote(const char* kind, uint32_t mask, int predicate, void* pc) {
  Vote v = {predicate != 0, 0};
  warp_collective(kind, mask, &v, run_vote, false, pc);
  return v.ballot;
}
inline int segment_source(int lane, int target, int width) {
  const int first = lane / width * width;
  return target < first || target >= first + width ? -1 : target;
}
}  // namespace simt

template <class T>
SIMT_INLINE T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int first = simt::lane() / width * width;
  return simt::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <class T>
SIMT_INLINE T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_up_sync", mask, value, simt::segment_source(lane, lane - int(delta), width));
}
template <class T>
SIMT_INLINE T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = simt::lane();
  return simt::shuffle("__shfl_down_sync", mask, value, simt::segment_source(lane, lane + int(delta), width));
}
template <class T>
SIMT_INLINE T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32) {
  const int lane = simt::lane();
  // Guide: a target in an earlier segment may be read, one in a later segment gives the own value.
  const int target = lane ^ lane_mask;
  return simt::shuffle("__shfl_xor_sync", mask, value, target >= (lane / width + 1) * width ? -1 : target);
}
SIMT_NOINLINE uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return simt::vote("__ballot_sync", mask, predicate, SIMT_HERE);
}
SIMT_NOINLINE int __any_sync(uint32_t mask, int predicate) {
  return simt::vote("__any_sync", mask, predicate, SIMT_HERE) != 0;
}
SIMT_NOINLINE int __all_sync(uint32_t mask, int predicate) {
  return simt::vote("__all_sync", mask, predicate, SIMT_HERE) == mask;
}

// redux.sync: each lane's value is folded into what all lanes of the mask get.
namespace simt {
inline void run_max(void* const* lanes, uint32_t mask) {
  uint32_t largest = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) largest = std::max(largest, *static_cast<uint32_t*>(lanes[lane]));
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) *static_cast<uint32_t*>(lanes[lane]) = largest;
}
}  // namespace simt
SIMT_NOINLINE uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  simt::warp_collective("__reduce_max_sync", mask, &value, simt::run_max, false, SIMT_HERE);
  return value;
}

// ---- atomics: one fiber runs at a time, so that plain code is atomic; they order nothing
// ----------------------------------

namespace simt {
// Tells the runtime of an atomic access: checked for bounds and alignment; atomics do not race with each other.
void atomic_access(const void* address, size_t bytes, void* pc);
template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic(T* address, F update, void* pc) {
  atomic_access(address, sizeof(T), pc);
  const T old = *address;
  *address = update(old);
  return old;
}
}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                \
  template <class T>                                                                 \
  SIMT_NOINLINE T name(T* address, std::common_type_t<T> value) {                    \
    return simt::atomic(address, [&](T old) -> T { return expression; }, SIMT_HERE); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, std::max(old, value))
SIMT_ATOMIC(atomicMin, std::min(old, value))
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, (void(old), value))
#undef SIMT_ATOMIC
template <class T>
SIMT_NOINLINE T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return simt::atomic(address, [&](T old) -> T { return old == compare ? value : old; }, SIMT_HERE);
}

// ---- arithmetic
// ------------------------------------------------------------------------------------------------------

inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline int __popcll(uint64_t x) {
  return __builtin_popcountll(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(uint32_t(x)) : 32;
}
inline int __clzll(long long x) {
  return x ? __builtin_clzll(uint64_t(x)) : 64;
}
inline uint32_t __brev(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) {
  return int(__float_as_uint(x));
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int i) {
  return __uint_as_float(uint32_t(i));
}
inline float rsqrtf(float x) {
  return 1.f / std::sqrt(x);
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
template <class T>
SIMT_INLINE T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;
