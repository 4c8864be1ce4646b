// How a warp holds quantization blocks: eight elements a lane, so that a block of `block` elements takes block / 8
// lanes, and a warp holds several small blocks, one of 256, or a chunk of a larger one at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/optim_codec.cuh"

namespace slk::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kChunkElements = kLanes * kLaneElements;

// Says that p is global memory, where it has been an integer: else the compiler takes the slower generic loads.
template <class T>
__device__ inline T* global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Eight neighbouring elements, as they lie in memory.
template <class T>
struct __align__(sizeof(T) == 1 ? 8 : 16) Eight {
  static constexpr int kWords = int(sizeof(T)) * kLaneElements / 4;
  uint32_t word[kWords];
};
template <class T>
__host__ __device__ inline bool can_move_whole(const T* p) {
  constexpr uintptr_t kBytes = sizeof(T) * kLaneElements < 16 ? sizeof(T) * kLaneElements : 16;
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

// The first `count` (0..8) of them; absent ones are zero bits. `whole`: all eight are there, and p is aligned.
template <class T>
__device__ inline Eight<T> load8(const T* p, int count, bool whole) {
  Eight<T> x;
  if (whole) {
    if constexpr (sizeof(T) == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      x.word[0] = v.x;
      x.word[1] = v.y;
    } else {
#pragma unroll
      for (int w = 0; w < x.kWords; w += 4) {
        const uint4 v = reinterpret_cast<const uint4*>(p)[w / 4];
        x.word[w] = v.x;
        x.word[w + 1] = v.y;
        x.word[w + 2] = v.z;
        x.word[w + 3] = v.w;
      }
    }
  } else {
    constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
    for (int w = 0; w < x.kWords; ++w) {
      x.word[w] = 0;
#pragma unroll
      for (int j = 0; j < kOfWord; ++j) {
        if (w * kOfWord + j >= count) continue;
        if constexpr (sizeof(T) == 4) {
          x.word[w] = reinterpret_cast<const uint32_t*>(p)[w];
        } else if constexpr (sizeof(T) == 2) {
          x.word[w] |= uint32_t(reinterpret_cast<const uint16_t*>(p)[w * kOfWord + j]) << 16 * j;
        } else {
          x.word[w] |= uint32_t(reinterpret_cast<const uint8_t*>(p)[w * kOfWord + j]) << 8 * j;
        }
      }
    }
  }
  return x;
}
template <class T>
__device__ inline void store8(T* p, const Eight<T>& x, int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 1) {
      *reinterpret_cast<uint2*>(p) = make_uint2(x.word[0], x.word[1]);
    } else {
#pragma unroll
      for (int w = 0; w < x.kWords; w += 4)
        reinterpret_cast<uint4*>(p)[w / 4] = make_uint4(x.word[w], x.word[w + 1], x.word[w + 2], x.word[w + 3]);
    }
  } else {
    constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (i >= count) continue;
      const uint32_t bits = x.word[i / kOfWord] >> i % kOfWord * 8 * int(sizeof(T));
      if constexpr (sizeof(T) == 4) {
        reinterpret_cast<uint32_t*>(p)[i] = bits;
      } else if constexpr (sizeof(T) == 2) {
        reinterpret_cast<uint16_t*>(p)[i] = uint16_t(bits);
      } else {
        reinterpret_cast<uint8_t*>(p)[i] = uint8_t(bits);
      }
    }
  }
}

// Eight number `unit` of an aligned array. A 32-bit unit makes the address one multiply-add.
template <class T>
__device__ inline Eight<T> load_unit(const T* array, uint32_t unit) {
  return load8(reinterpret_cast<const T*>(reinterpret_cast<const Eight<T>*>(array) + unit), kLaneElements, true);
}
template <class T>
__device__ inline void store_unit(T* array, uint32_t unit, const Eight<T>& x) {
  store8(reinterpret_cast<T*>(reinterpret_cast<Eight<T>*>(array) + unit), x, kLaneElements, true);
}

// Codes of the `count` elements from `first` on, a multiple of 8; absent ones read as 0, and the absent low half of a
// last byte is written as 0.
template <Codec kCodec>
__device__ inline Codes<kCodec> load_codes(const uint8_t* codes, int64_t first, int count, bool whole) {
  if constexpr (codec::bits(kCodec) == 8) {
    const Eight<uint8_t> x = load8(codes + first, count, whole);
    return {x.word[0], x.word[1]};
  } else {
    const uint8_t* p = codes + first / 2;
    if (whole) return *reinterpret_cast<const uint32_t*>(p);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * i < count) word |= uint32_t(p[i]) << 8 * i;
    return word;
  }
}
template <Codec kCodec>
__device__ inline void store_codes(uint8_t* codes, int64_t first, int count, bool whole, const Codes<kCodec>& x) {
  if constexpr (codec::bits(kCodec) == 8) {
    store8(codes + first, Eight<uint8_t>{{x.x, x.y}}, count, whole);
  } else {
    uint8_t* p = codes + first / 2;
    if (whole) {
      *reinterpret_cast<uint32_t*>(p) = x;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * i < count) p[i] = uint8_t(x >> 8 * i & (2 * i + 1 < count ? 0xffu : 0xf0u));
  }
}
template <Codec kCodec>
__device__ inline Codes<kCodec> load_codes_unit(const void* codes, uint32_t unit) {
  return global(static_cast<const Codes<kCodec>*>(codes))[unit];
}
template <Codec kCodec>
__device__ inline void store_codes_unit(void* codes, uint32_t unit, const Codes<kCodec>& x) {
  global(static_cast<Codes<kCodec>*>(codes))[unit] = x;
}
template <Codec kCodec>
__host__ __device__ inline bool can_move_codes(const uint8_t* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Codes<kCodec>) == 0;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

__device__ inline float element(const Eight<float>& x, int i) {
  return __uint_as_float(x.word[i]);
}
__device__ inline float element(const Eight<__nv_bfloat16>& x, int i) {
  return __uint_as_float(i % 2 ? x.word[i / 2] & 0xffff0000u : x.word[i / 2] << 16);
}
__device__ inline float element(const Eight<__half>& x, int i) {
  return __half2float(__ushort_as_half(uint16_t(x.word[i / 2] >> i % 2 * 16)));
}

// Rounded to nearest even.
__device__ inline void set_pair(Eight<float>& x, int pair, float low, float high) {
  x.word[2 * pair] = __float_as_uint(low);
  x.word[2 * pair + 1] = __float_as_uint(high);
}
__device__ inline void set_pair(Eight<__nv_bfloat16>& x, int pair, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  x.word[pair] = uint32_t(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}
__device__ inline void set_pair(Eight<__half>& x, int pair, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  x.word[pair] = uint32_t(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
}
template <class T>
__device__ inline Eight<T> rounded(const float (&x)[kLaneElements]) {
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; ++i) set_pair(out, i, x[2 * i], x[2 * i + 1]);
  return out;
}

// ---- blocks in a warp -----------------------------------------------------------------------------------------------

// Blocks of at most 256 elements; a larger one is one block of 32 lanes, in chunks.
struct Lanes {
  int of_block;   // lanes a block
  int blocks;     // blocks a warp
  int group, at;  // this lane is lane `at` of block `group`

  __device__ explicit Lanes(int block)
      : of_block(block >= kChunkElements ? kLanes : block / kLaneElements), blocks(kLanes / of_block) {
    const int lane = threadIdx.x % kLanes;
    group = lane / of_block;
    at = lane % of_block;
  }
  __device__ bool idle() const { return group >= blocks; }

  // The largest value of the block's lanes, in all of them.
  __device__ uint32_t max(uint32_t value) const {
    if (of_block == kLanes) return __reduce_max_sync(kAllLanes, value);
    for (int step = 1; step < of_block; step *= 2) {
      const uint32_t above = __shfl_down_sync(kAllLanes, value, step);
      if (at + step < of_block && above > value) value = above;
    }
    return __shfl_sync(kAllLanes, value, threadIdx.x % kLanes - at);
  }
};

// max() for a number of lanes that the compiler knows.
template <int kOfBlock>
__device__ inline uint32_t max_of_lanes(uint32_t value) {
  static_assert(kLanes % kOfBlock == 0);
  if constexpr (kOfBlock == kLanes) {
    return __reduce_max_sync(kAllLanes, value);
  } else {
#pragma unroll
    for (int step = 1; step < kOfBlock; step *= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
  }
}

// One block or chunk as a lane sees it.
struct Part {
  int64_t first;  // this lane's first element
  int count;      // and how many it has, 0..8
};
__device__ inline Part part_of(int64_t n, int64_t first, int64_t end) {
  const int64_t left = (end < n ? end : n) - first;
  return {first, left <= 0 ? 0 : left < kLaneElements ? int(left) : kLaneElements};
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

}  // namespace slk::cuda
