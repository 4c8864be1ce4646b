// Parameters and gradients of a chunk as fp32 copies in L1, for what the step kernels do not read and write themselves:
// float16, coupled weight decay, stochastic rounding, master remainders, directions.
#pragma once

#include "cpu/simd_pairs.h"
#include "cpu/types.h"
#include "slkernels/optim.h"
#include "slkernels/philox.cuh"

namespace slk::cpu::SLK_ISA {

using AllLanes = std::integral_constant<int, kLanes>;

// f(i, count) for each vector of n elements; count is a constant for all but the last: a copy of unknown size is a
// call.
template <class F>
SLK_INLINE void for_vectors(int n, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, AllLanes());
  if (i < n) f(i, n - i);
}

template <class T>
SLK_INLINE V load_elements(const T* p, AllLanes) {
  return load(p);
}
template <class T>
SLK_INLINE V load_elements(const T* p, int count) {
  return load_n(p, count);
}
template <class T>
SLK_INLINE void store_elements(T* p, V x, AllLanes) {
  store(p, x);
}
template <class T>
SLK_INLINE void store_elements(T* p, V x, int count) {
  store_n(p, x, count);
}

// The 16 random bits of elements start .. start + n - 1 (a multiple of 8 on), kLanes draws of 8 elements at a time.
// draws: room for n elements, rounded up to 8 kLanes.
inline void fill_random(const RandomKey& key, uint32_t tensor, int64_t start, int n, uint16_t* draws) {
  constexpr int kElements = RoundingBits::kElements;
  VU lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = uint32_t(lane);
  for (int i = 0; i < n; i += kElements * kLanes) {
    const uint64_t group = uint64_t(start + i) / kElements;
    VU c[4], low, high, first, third;
    c[0] = lanes + uint32_t(group);
    c[1] = uint32_t(group >> 32) - (VU)(c[0] < lanes);  // the carry
    c[2] = VU{} + tensor;
    c[3] = VU{} + key.step;
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
    for (int round = 0; round < Philox::kRounds; ++round) {
      multiply_wide(c[0], Philox::kMultiply0, first, low);
      multiply_wide(c[2], Philox::kMultiply1, third, high);
      const VU next0 = third ^ c[1] ^ k0, next2 = first ^ c[3] ^ k1;
      c[0] = next0;
      c[1] = high;
      c[2] = next2;
      c[3] = low;
      k0 += Philox::kWeyl0;
      k1 += Philox::kWeyl1;
    }
    uint32_t words[4][kLanes], in_order[4 * kLanes];
    for (int word = 0; word < 4; ++word) std::memcpy(words[word], &c[word], sizeof c[word]);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int word = 0; word < 4; ++word) in_order[4 * lane + word] = words[word][lane];
    std::memcpy(draws + i, in_order, sizeof in_order);  // the lower half first
  }
}

// ---- kLanes 8- and 16-bit integers ----------------------------------------------------------------------------------

template <class T>
using Narrow [[gnu::vector_size(sizeof(T) * kLanes)]] = T;

// The first `count` of kLanes integers, extended to 32 bits by their sign if they have one; and back, the low bits.
template <class T, class Count>
SLK_INLINE VU load_integers(const T* p, Count count) {
  Narrow<T> v = {};
  std::memcpy(&v, p, count * sizeof(T));
  return (VU) __builtin_convertvector(v, VI);
}
template <class T, class Count>
SLK_INLINE void store_integers(T* p, VU x, Count count) {
  const Narrow<T> v = __builtin_convertvector(x, Narrow<T>);
  std::memcpy(p, &v, count * sizeof(T));
}

// ---- codec::round_*_stochastic and the master weights, of kLanes numbers -------------------------------------------

SLK_INLINE VI is_special(VU u) {  // infinities and NaN
  return (VI)((u & 0x7f800000u) == 0x7f800000u);
}
SLK_INLINE VU round_bf16_stochastic(V x, VU random) {
  const VU u = (VU)x, quiet = (u & 0x7fffffu) != 0 ? VU{} + 0x40u : VU{};
  return is_special(u) ? (u >> 16 | quiet) : (u + random) >> 16;
}
SLK_INLINE VU round_f16_stochastic(V x, VU random) {
  const VU u = (VU)x, sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  // Kept from overflowing the conversion where it does not count.
  const VU subnormal = (VU) __builtin_convertvector(min((V)a, broadcast(0x1p-14f)) * broadcast(0x1p37f), VI);
  const VU fixed = a < 0x38800000u ? subnormal : a - 0x38000000u;
  const VU h = (fixed + (random >> 3)) >> 13, finite = h < 0x7c00u ? h : VU{} + 0x7c00u;
  return sign | (a > 0x7f800000u ? VU{} + 0x7e00u : finite);
}

struct MasterVector {
  VU high, low;
};
SLK_INLINE MasterVector split_master16(V x) {
  const VU u = x != x ? VU{} + 0x7fc00000u : (VU)x;
  return {(u + 0x8000u) >> 16, u};
}
SLK_INLINE MasterVector split_master8(V x, VU added) {
  const VU u = x != x ? VU{} + 0x7fc00000u : (VU)x, r = is_special((VU)x) ? u : u + added;
  return {(r + 0x8000u) >> 16, r >> 8};
}

struct ParamBuffers {
  alignas(64) float p[kMaxQuantBlock], g[kMaxQuantBlock];
  alignas(64) uint16_t random[kMaxQuantBlock];
  const StepTensor& t;
  const StepCall& call;

  ParamBuffers(const StepTensor& t, const StepCall& call) : t(t), call(call) {}

  void load(int64_t start, int n) {
    with_float_type(t.dtype, [&](auto* type) {
      using T = Element<decltype(type)>;
      const V inverse = broadcast(call.scalars.inv_grad_scale), l2 = broadcast(call.scalars.l2);
      const T* grads = static_cast<const T*>(t.g) + start;
      for_vectors(n, [&](int i, auto count) { SLK_ISA::store(g + i, load_elements(grads + i, count) * inverse); });
      if (t.out) return;
      const T* params = static_cast<const T*>(t.p) + start;
      for_vectors(n, [&](int i, auto count) { SLK_ISA::store(p + i, load_elements(params + i, count)); });
      if (t.low) join_master(start, n);
      if (call.scalars.l2 != 0)
        for (int i = 0; i < n; i += kLanes) SLK_ISA::store(g + i, fma(l2, SLK_ISA::load(p + i), SLK_ISA::load(g + i)));
    });
  }

  void store(int64_t start, int n) {
    const bool rounds = call.stochastic && t.dtype != DType::f32 && !t.out && !(t.low && t.low_bits == 16);
    if (rounds) fill_random(call.random, t.index, start, n, random);
    if (t.out) {
      store_nearest(t.out, t.out_dtype, start, n);
    } else if (t.low) {
      split_master(start, n);
    } else if (rounds) {
      uint16_t* out = static_cast<uint16_t*>(t.p) + start;
      const bool is_bf16 = t.dtype == DType::bf16;
      for_vectors(n, [&](int i, auto count) {
        const V x = SLK_ISA::load(p + i);
        const VU draws = load_integers(random + i, AllLanes());
        store_integers(out + i, is_bf16 ? round_bf16_stochastic(x, draws) : round_f16_stochastic(x, draws), count);
      });
    } else {
      store_nearest(t.p, t.dtype, start, n);
    }
  }

 private:
  void store_nearest(void* to, DType dtype, int64_t start, int n) {
    with_float_type(dtype, [&](auto* type) {
      auto* out = static_cast<Element<decltype(type)>*>(to) + start;
      for_vectors(n, [&](int i, auto count) { store_elements(out + i, SLK_ISA::load(p + i), count); });
    });
  }
  void join_master(int64_t start, int n) {
    const uint16_t* high = static_cast<const uint16_t*>(t.p) + start;
    const auto join = [&](const auto* low, int shift) {
      for_vectors(n, [&](int i, auto count) {
        const VU bits = (load_integers(high + i, count) << 16) + (load_integers(low + start + i, count) << shift);
        SLK_ISA::store(p + i, (V)bits);
      });
    };
    if (t.low_bits == 16)
      join(static_cast<const int16_t*>(t.low), 0);
    else
      join(static_cast<const int8_t*>(t.low), 8);
  }
  void split_master(int64_t start, int n) {
    uint16_t* high = static_cast<uint16_t*>(t.p) + start;
    const auto put = [&](auto* low, auto split) {
      for_vectors(n, [&](int i, auto count) {
        const MasterVector x = split(SLK_ISA::load(p + i), i);
        store_integers(high + i, x.high, count);
        store_integers(low + start + i, x.low, count);
      });
    };
    auto* low8 = static_cast<int8_t*>(t.low);
    if (t.low_bits == 16)
      put(static_cast<int16_t*>(t.low), [&](V x, int) { return split_master16(x); });
    else if (call.stochastic)
      put(low8, [&](V x, int i) { return split_master8(x, load_integers(random + i, AllLanes()) >> 8); });
    else
      put(low8, [&](V x, int) { return split_master8(x, ((VU)x >> 8 & 1u) + 0x7fu); });  // nearest even
  }
};

}  // namespace slk::cpu::SLK_ISA
