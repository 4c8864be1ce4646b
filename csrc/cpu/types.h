// From a run-time DType to a C++ element type.
#pragma once

#include "cpu/simd.h"
#include "slkernels/types.h"

namespace slk::cpu::SLK_ISA {

template <class T>
using Element = std::remove_pointer_t<T>;

// Calls f with a null pointer of the element type.
template <class F>
SLK_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    case DType::f16:
      return f((f16*)nullptr);
    case DType::f64:
      return f((double*)nullptr);
  }
}
// The same, without f64: the panel kernels sum in fp32.
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

}  // namespace slk::cpu::SLK_ISA
