// Learned 2:4 masks on vectors of groups. Contract: slkernels/semi24_mask.h.
//
// Bound by arithmetic: some 450 vector instructions for kLanes groups, of which a third are logarithms and a third the
// Philox draw; loading and storing records takes 60 shuffles.
#include "slkernels/semi24_mask.cuh"

#include "cpu/random_normal.h"
#include "cpu/simd_groups.h"
#include "cpu/types.h"

namespace slk::cpu::SLK_ISA {
namespace {

struct MaskVector : VectorWords {
  using Real = float;
  static SLK_INLINE void multiply(U a, uint32_t b, U& high, U& low) { multiply_wide(a, b, high, low); }
  static SLK_INLINE F max(F a, F b) { return SLK_ISA::max(a, b); }
  static SLK_INLINE I min(I a, I b) { return SLK_ISA::min(a, b); }
  static SLK_INLINE I max(I a, I b) { return SLK_ISA::max(a, b); }
  static SLK_INLINE F where_at_least(F a, F b, F yes, F no) { return (VI)(a >= b) ? yes : no; }
  static SLK_INLINE F divide(F a, F b) { return a / b; }
  static SLK_INLINE F log(F a) { return log_of<MaskVector>(a); }
  static SLK_INLINE F exp2(F a) { return exp2_of<MaskVector>(a); }
};

// f(first group, where it begins in W, elements of the groups in W) for vectors of kLanes groups, fewer at the end of a
// row. A W whose rows are whole groups is one row.
template <class F>
SLK_INLINE void each_vector_of_groups(int64_t m, Range groups, F f) {
  const bool whole = m % 4 == 0;
  const int64_t per_row = groups24(m);
  for (int64_t g = groups.begin; g < groups.end;) {
    const int64_t row = whole ? 0 : g / per_row, start = row * m + 4 * (g - row * per_row);
    const int64_t row_end = whole ? groups.end : (row + 1) * per_row, end = row_end < groups.end ? row_end : groups.end;
    const int64_t columns_end = end < row_end || whole ? start + 4 * (end - g) : (row + 1) * m;
    for (int64_t column = start; g < end; g += kLanes, column += 4 * kLanes) {
      const int64_t rest = columns_end - column;
      f(g, column, rest < 4 * kLanes ? rest : 4 * kLanes, end - g < kLanes ? end - g : kLanes);
    }
    g = end;
  }
}

// `count` elements of the records at p; zeros beyond.
template <class T, int kSize>
SLK_INLINE void read_records(const T* p, int64_t count, V (&x)[kSize]) {
  if (count == kSize * kLanes) return load_records(p, x);
  alignas(64) T room[kSize * kLanes] = {};
  std::memcpy(room, p, count * sizeof(T));
  load_records(room, x);
}
template <class T, int kSize>
SLK_INLINE void write_records(T* p, int64_t count, const V (&x)[kSize]) {
  if (count == kSize * kLanes) return store_records(p, x);
  alignas(64) T room[kSize * kLanes];
  store_records(room, x);
  std::memcpy(p, room, count * sizeof(T));
}

template <class TG>
SLK_INLINE SoftGroup<MaskVector> soft_groups(const TG* gate, int64_t groups, int64_t first, uint64_t seed,
                                             const MaskFactors<float>& factors) {
  V g[kCodes24];
  VU low, high;
  read_records(gate, kCodes24 * groups, g);
  counters(uint64_t(first), low, high);
  return soft_group<MaskVector>(g, factors, low, high, seed);
}

MaskFactors<float> factors_of(const SoftMask24& mask) {
  return MaskFactors<float>::of<MaskFloat>(float(mask.kappa), float(mask.tau));
}

// f(null pointers of W's and the gates' element types).
template <class F>
SLK_INLINE void with_types(const GatedWeight24& x, F f) {
  with_float_type(x.type, [&](auto* type) { with_float_type(x.gate_type, [&](auto* gate) { f(type, gate); }); });
}

void soft_mask(const GatedWeight24& x, const SoftMask24& mask, Range groups, void* y) {
  const MaskFactors<float> factors = factors_of(mask);
  with_types(x, [&](auto* type, auto* gate_type) {
    using T = Element<decltype(type)>;
    using TG = Element<decltype(gate_type)>;
    const T* w = static_cast<const T*>(x.w);
    const TG* gate = static_cast<const TG*>(x.gate);
    each_vector_of_groups(x.m, groups, [&](int64_t g, int64_t at, int64_t columns, int64_t count) {
      const auto soft = soft_groups(gate + kCodes24 * g, count, g, mask.seed, factors);
      V v[4];
      read_records(w + at, columns, v);
      for (int c = 0; c < 4; ++c) v[c] = v[c] * soft.mask(c);
      write_records(static_cast<T*>(y) + at, columns, v);
    });
  });
}

void soft_mask_backward(const GatedWeight24& x, const SoftMask24& mask, const void* dy, Range groups, void* dgate,
                        void* dw) {
  const MaskFactors<float> factors = factors_of(mask);
  with_types(x, [&](auto* type, auto* gate_type) {
    using T = Element<decltype(type)>;
    using TG = Element<decltype(gate_type)>;
    const T *w = static_cast<const T*>(x.w), *cotangent = static_cast<const T*>(dy);
    const TG* gate = static_cast<const TG*>(x.gate);
    each_vector_of_groups(x.m, groups, [&](int64_t g, int64_t at, int64_t columns, int64_t count) {
      const auto soft = soft_groups(gate + kCodes24 * g, count, g, mask.seed, factors);
      V d[4], v[4], out[kCodes24];
      read_records(cotangent + at, columns, d);
      if (dgate) {
        read_records(w + at, columns, v);
        gate_gradient<MaskVector>(soft, factors, d, v, out);
        write_records(static_cast<TG*>(dgate) + kCodes24 * g, kCodes24 * count, out);
      }
      if (!dw) return;
      for (int c = 0; c < 4; ++c) d[c] = d[c] * soft.mask(c);
      write_records(static_cast<T*>(dw) + at, columns, d);
    });
  });
}

void gate_to_mask(DType type, const void* gate, int64_t m, Range groups, uint8_t* mask) {
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    each_vector_of_groups(m, groups, [&](int64_t g, int64_t at, int64_t columns, int64_t count) {
      V x[kCodes24];
      read_records(static_cast<const T*>(gate) + kCodes24 * g, kCodes24 * count, x);
      V best = x[0];
      VI code = {};
      for (int k = 1; k < kCodes24; ++k) {
        const VI better = (VI)(x[k] > best) | ((VI)(x[k] != x[k]) & (VI)(best == best));
        code = better ? VI{} + k : code;
        best = better ? x[k] : best;
      }
      const VU bytes = pattern_bytes24((VU)code);
      std::memcpy(mask + at, &bytes, columns);
    });
  });
}

void srste_grad(DType type, const void* w, const uint8_t* mask, float lam, Range elements, void* grad) {
  const V factor = broadcast(lam);
  with_float_type(type, [&](auto* tag) {
    using T = Element<decltype(tag)>;
    const T* from = static_cast<const T*>(w);
    T* to = static_cast<T*>(grad);
    int64_t i = elements.begin;
    for (; i + kLanes <= elements.end; i += kLanes) {
      const V g = load(to + i), moved = fma(factor, load(from + i), g);
      store(to + i, load_bytes(mask + i) != 0 ? g : moved);
    }
    for (; i < elements.end; ++i)
      if (!mask[i]) from_float(__builtin_fmaf(lam, to_float(from[i]), to_float(to[i])), to[i]);
  });
}

}  // namespace

extern const MaskKernels mask_table;
const MaskKernels mask_table = {soft_mask, soft_mask_backward, gate_to_mask, srste_grad};

}  // namespace slk::cpu::SLK_ISA
