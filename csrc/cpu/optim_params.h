// Parameters and gradients of a chunk as fp32 copies in L1, for what the step kernels do not read and write themselves:
// float16, coupled weight decay, stochastic rounding, master remainders, directions.
#pragma once

#include "cpu/simd_pairs.h"
#include "cpu/types.h"
#include "slkernels/optim.h"
#include "slkernels/philox.cuh"

namespace slk::cpu::SLK_ISA {

// f(i, count) for each vector of n elements.
template <class F>
SLK_INLINE void for_vectors(int n, F f) {
  for (int i = 0; i < n; i += kLanes) f(i, n - i < kLanes ? n - i : kLanes);
}

// The 16 random bits of elements start .. start + n - 1 (a multiple of 8 on), kLanes draws of 8 elements at a time.
// words: room for n elements, rounded up to 8 kLanes.
inline void fill_random(const RandomKey& key, uint32_t tensor, int64_t start, int n, uint32_t* words) {
  constexpr int kElements = RoundingBits::kElements;
  for (int i = 0; i < n; i += kElements * kLanes) {
    VU c[4], low, high, first, third;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t group = uint64_t(start + i) / kElements + uint64_t(lane);
      c[0][lane] = uint32_t(group);
      c[1][lane] = uint32_t(group >> 32);
    }
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
    for (int lane = 0; lane < kLanes; ++lane)
      for (int word = 0; word < 4; ++word) words[i / 2 + 4 * lane + word] = c[word][lane];
  }
}

struct ParamBuffers {
  alignas(64) float p[kMaxQuantBlock], g[kMaxQuantBlock];
  uint32_t random[kMaxQuantBlock / 2];  // half words
  const StepTensor& t;
  const StepCall& call;

  ParamBuffers(const StepTensor& t, const StepCall& call) : t(t), call(call) {}

  SLK_INLINE uint32_t draw(int i) const { return random[i / 2] >> (i % 2 * 16) & 0xffffu; }

  void load(int64_t start, int n) {
    with_float_type(t.dtype, [&](auto* type) {
      using T = Element<decltype(type)>;
      const V inverse = broadcast(call.scalars.inv_grad_scale), l2 = broadcast(call.scalars.l2);
      const T* grads = static_cast<const T*>(t.g) + start;
      for_vectors(n, [&](int i, int count) { SLK_ISA::store(g + i, load_n(grads + i, count) * inverse); });
      if (t.out) return;
      const T* params = static_cast<const T*>(t.p) + start;
      for_vectors(n, [&](int i, int count) { SLK_ISA::store(p + i, load_n(params + i, count)); });
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
      if (t.dtype == DType::bf16)
        for (int i = 0; i < n; ++i) out[i] = codec::round_bf16_stochastic(p[i], draw(i));
      else
        for (int i = 0; i < n; ++i) out[i] = codec::round_f16_stochastic(p[i], draw(i));
    } else {
      store_nearest(t.p, t.dtype, start, n);
    }
  }

 private:
  void store_nearest(void* to, DType dtype, int64_t start, int n) {
    with_float_type(dtype, [&](auto* type) {
      auto* out = static_cast<Element<decltype(type)>*>(to) + start;
      for_vectors(n, [&](int i, int count) { store_n(out + i, SLK_ISA::load(p + i), count); });
    });
  }
  void join_master(int64_t start, int n) {
    const uint16_t* high = static_cast<const uint16_t*>(t.p) + start;
    if (t.low_bits == 16) {
      const int16_t* low = static_cast<const int16_t*>(t.low) + start;
      for (int i = 0; i < n; ++i) p[i] = codec::join_master16(high[i], low[i]);
    } else {
      const int8_t* low = static_cast<const int8_t*>(t.low) + start;
      for (int i = 0; i < n; ++i) p[i] = codec::join_master8(high[i], low[i]);
    }
  }
  void split_master(int64_t start, int n) {
    uint16_t* high = static_cast<uint16_t*>(t.p) + start;
    const auto put = [&](auto* low, auto split) {
      for (int i = 0; i < n; ++i) {
        const codec::Master x = split(i);
        high[i] = x.high;
        low[start + i] = std::remove_pointer_t<decltype(low)>(x.low);
      }
    };
    if (t.low_bits == 16)
      put(static_cast<int16_t*>(t.low), [&](int i) { return codec::split_master16(p[i]); });
    else if (call.stochastic)
      put(static_cast<int8_t*>(t.low), [&](int i) { return codec::split_master8_stochastic(p[i], draw(i)); });
    else
      put(static_cast<int8_t*>(t.low), [&](int i) { return codec::split_master8(p[i]); });
  }
};

}  // namespace slk::cpu::SLK_ISA
