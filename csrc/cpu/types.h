// From a run-time DType to a C++ element type.
#pragma once

#include "cpu/simd.h"
#include "slkernels/types.h"

namespace slk::cpu::SLK_ISA {

template <class T>
using Element = std::remove_pointer_t<T>;

// Calls f with a null pointer of the element type; not for f64, which the kernels that sum in fp32 do not take.
template <class F>
SLK_INLINE void with_float_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    case DType::f16:
      return f((f16*)nullptr);
    case DType::f64:
      return;
  }
}
// The same, f64 included.
template <class F>
SLK_INLINE void with_type(DType dtype, F f) {
  dtype == DType::f64 ? f((double*)nullptr) : with_float_type(dtype, f);
}

}  // namespace slk::cpu::SLK_ISA
