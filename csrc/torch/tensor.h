// The torch boundary: the types, checks and calls that every file of csrc/torch uses. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "slkernels/types.h"

// Lives in libtorch_cuda only. Weak, so that one binary loads in CPU-only torch, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                          AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                                          double beta, double alpha);

namespace slk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// An op's argument of type str. torch's own conversion to std::string (as of 2.14) leaves a string behind on the heap
// at every call.
struct Text : std::string {
  using std::string::string;
};

}  // namespace slk

template <>
struct torch::stable::detail::ToImpl<slk::Text> {
  static slk::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);  // ours to delete
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    slk::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
template <>
struct torch::stable::detail::FromImpl<slk::Text> {
  static StableIValue call(const slk::Text& text, uint64_t version, bool is_internal) {
    return FromImpl<std::string>::call(text, version, is_internal);
  }
};

namespace slk {

// ---- errors -------------------------------------------------------------------------------------------------------

inline std::string show(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ']';
  return out.str();
}
inline const char* show(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// What `check` said last on this thread. The C interface between an op and the ops that it calls carries an error code
// only; a composite op raises its inner op's message from here.
inline std::string& last_error() {
  thread_local std::string text;
  return text;
}

// Throws "slkernels::<op>: <parts...>" as a RuntimeError unless `ok`.
template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream out;
  out << "slkernels::" << op << ": ";
  (out << ... << parts);
  last_error() = out.str();
  throw std::runtime_error(out.str());
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      check(false, op, name, " must be float32, bfloat16, float16 or float64, got ", show(t.scalar_type()));
      return DType::f32;
  }
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, name, " must have ", like_name, "'s dtype ",
        show(like.scalar_type()), ", got ", show(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* like_name,
                              const Tensor& like) {
  check(t.device() == like.device(), op, name, " must be on the device of ", like_name);
}

// ---- shapes and allocation ----------------------------------------------------------------------------------------

inline Shape shape_of(const Tensor& t) {
  Shape s(t.dim());
  for (size_t d = 0; d < s.size(); ++d) s[d] = t.size(d);
  return s;
}
inline Tensor empty_like_shape(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()});
}
inline Tensor empty_like_shape(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// x as [tokens, features]: all leading dimensions are tokens. A view where the strides allow it, else a copy.
inline Tensor as_tokens(const char* op, const char* name, const Tensor& x, int64_t features) {
  check(x.dim() >= 1 && x.size(x.dim() - 1) == features, op, name, " must be [tokens, ", features, "], got ", show(x));
  if (x.dim() == 2 && (x.stride(1) == 1 || features <= 1)) return x;
  const Tensor y = x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (x.dim() == 2) return y;
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) tokens *= x.size(d);
  const int64_t shape[2] = {tokens, features};
  return torch::stable::view(y, {shape, 2});
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline Tensor t2(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// ---- calls into torch ---------------------------------------------------------------------------------------------

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

// out = beta * self + alpha * a b, by torch's dense library. beta = 0 ignores what `self` holds.
inline void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                      double alpha) {
  const auto addmm = out.is_cuda() ? aoti_torch_cuda_addmm_out : aoti_torch_cpu_addmm_out;
  TORCH_ERROR_CODE_CHECK(addmm(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// An aten op by name, for what has no shim of its own: aten("aten::silu", "", x). One tensor comes back.
template <class... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// One of our own ops: `stack` holds its arguments, and its results after the call. An error keeps its text.
template <size_t N>
void call_op(const char* name, std::array<StableIValue, N>& stack) {
  last_error().clear();
  const auto error = torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
  if (error != TORCH_SUCCESS && !last_error().empty()) throw std::runtime_error(last_error());
  TORCH_ERROR_CODE_CHECK(error);
}

// Grow-only scratch of this thread, 64-byte aligned; its contents last until the next call on the same thread.
// Panels are reused by every call: allocating them each time costs a page fault per 4 KB.
float* thread_scratch(int64_t floats);

}  // namespace slk
