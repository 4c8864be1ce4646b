// Merging attention over two sets of keys, and its gradient: one pass over the rows, bound by memory. Contract:
// slkernels/attention.h.
#include "slkernels/attention_merge.cuh"
#include "cpu/attention_tile.h"

namespace slk::cpu::SLK_ISA {
namespace {

template <class T>
void merge_rows(const MergeStates& a, int64_t b, int64_t h, Range tokens) {
  const int64_t numbers = (b * a.heads + h) * a.tokens;
  const float *lse1 = static_cast<const float*>(a.lse1) + numbers, *lse2 = static_cast<const float*>(a.lse2) + numbers;
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    const MergeWeights w(lse1[i], lse2[i]);
    static_cast<float*>(a.lse)[numbers + i] = float(w.lse);
    const T *o1 = head<T>(a.o1, a.o1_strides, b, h, i), *o2 = head<T>(a.o2, a.o2_strides, b, h, i);
    T* o = head<T>(a.o, a.o_strides, b, h, i);
    in_vectors(a.features, [&](int64_t d, int count) {
      store_up_to(o + d, load_up_to(o1 + d, count) * float(w.first) + load_up_to(o2 + d, count) * float(w.second),
                  count);
    });
  }
}

template <class T>
void merge_rows_backward(const MergeStatesBackward& g, int64_t b, int64_t h, Range tokens) {
  const MergeStates& a = g.forward;
  const int64_t numbers = (b * a.heads + h) * a.tokens;
  const float *lse1 = static_cast<const float*>(a.lse1) + numbers, *lse2 = static_cast<const float*>(a.lse2) + numbers;
  for (int64_t i = tokens.begin; i < tokens.end; ++i) {
    const MergeWeights w(lse1[i], lse2[i]);
    const T *o1 = head<T>(a.o1, a.o1_strides, b, h, i), *o2 = head<T>(a.o2, a.o2_strides, b, h, i);
    const T* d_o = head<T>(g.d_o, g.d_o_strides, b, h, i);
    T *do1 = head<T>(g.do1, g.do1_strides, b, h, i), *do2 = head<T>(g.do2, g.do2_strides, b, h, i);
    V difference = zero();  // do . (o1 - o2); o1 - o = w2 (o1 - o2), o2 - o = -w1 (o1 - o2)
    in_vectors(a.features, [&](int64_t d, int count) {
      const V x = load_up_to(d_o + d, count);
      difference += x * (load_up_to(o1 + d, count) - load_up_to(o2 + d, count));
      store_up_to(do1 + d, x * float(w.first), count);
      store_up_to(do2 + d, x * float(w.second), count);
    });
    const double dot = sum(difference), dlse = g.dlse ? static_cast<const float*>(g.dlse)[numbers + i] : 0;
    static_cast<float*>(g.dlse1)[numbers + i] = float(w.first * (dlse + w.second * dot));
    static_cast<float*>(g.dlse2)[numbers + i] = float(w.second * (dlse - w.first * dot));
  }
}

}  // namespace

void attention_merge(const MergeStates& a, int64_t batch, int64_t head, Range tokens) {
  with_float_type(a.dtype, [&](auto* type) { merge_rows<Element<decltype(type)>>(a, batch, head, tokens); });
}

void attention_merge_backward(const MergeStatesBackward& g, int64_t batch, int64_t head, Range tokens) {
  with_float_type(g.forward.dtype,
                  [&](auto* type) { merge_rows_backward<Element<decltype(type)>>(g, batch, head, tokens); });
}

}  // namespace slk::cpu::SLK_ISA
