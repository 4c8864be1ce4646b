// SwiGLU, element by element. Contract: slkernels/lowrank.h. Bound by memory: about 20 vector instructions, most of
// them e^x's, for the 12 (forward) or 20 bytes (backward) of an fp32 element.
#include "cpu/math.h"
#include "cpu/types.h"
#include "slkernels/lowrank.h"

namespace slk::cpu::SLK_ISA {
namespace {

SLK_INLINE V sigmoid(V x) {
  return 1.f / (1.f + exp(-x));
}
SLK_INLINE double sigmoid(double x) {
  return 1 / (1 + __builtin_exp(-x));
}

template <class F>
SLK_INLINE F silu_times(F gate, F up) {
  return gate * sigmoid(gate) * up;
}

// gate and up become their gradients.
template <class F>
SLK_INLINE void silu_times_backward(F dh, F& gate, F& up) {
  const F s = sigmoid(gate), silu = gate * s;
  gate = dh * up * (s + silu * (F{} + 1.f - s));
  up = dh * silu;
}

// f(first element, elements: a vector's or fewer) over `range`.
template <class F>
SLK_INLINE void for_vectors(Range range, F f) {
  int64_t i = range.begin;
  for (; i + kLanes <= range.end; i += kLanes) f(i, kLanes);
  if (i < range.end) f(i, int(range.end - i));
}
template <class T>
SLK_INLINE V load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load_n(p, count);
}
template <class T>
SLK_INLINE void store_some(T* p, V v, int count) {
  count == kLanes ? store(p, v) : store_n(p, v, count);
}

void forward(DType dtype, const void* gate, const void* up, void* h, Range range) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
    T* out = static_cast<T*>(h);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = range.begin; i < range.end; ++i) out[i] = silu_times(g[i], u[i]);
    } else {
      for_vectors(range, [&](int64_t i, int count) {
        store_some(out + i, silu_times(load_some(g + i, count), load_some(u + i, count)), count);
      });
    }
  });
}

void backward(DType dtype, const void* dh, void* gate, void* up, Range range) {
  with_type(dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* d = static_cast<const T*>(dh);
    T *g = static_cast<T*>(gate), *u = static_cast<T*>(up);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = range.begin; i < range.end; ++i) silu_times_backward(d[i], g[i], u[i]);
    } else {
      for_vectors(range, [&](int64_t i, int count) {
        V dg = load_some(g + i, count), du = load_some(u + i, count);
        silu_times_backward(load_some(d + i, count), dg, du);
        store_some(g + i, dg, count);
        store_some(u + i, du, count);
      });
    }
  });
}

}  // namespace

extern const SwigluKernels swiglu_table;
const SwigluKernels swiglu_table = {forward, backward};

}  // namespace slk::cpu::SLK_ISA
