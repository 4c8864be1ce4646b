// The multi-tensor steps at the torch boundary: checks, the step's scalars, threads over the flattened block list.
#include "torch/optim_step.h"

#include <atomic>

namespace slk::optim {
namespace {

// Throws the op's error about element i of a list. The callers test first: with hundreds of tensors, building unused
// messages costs more than the step.
template <class... Parts>
void fail(const char* op, const char* list, size_t i, const Parts&... parts) {
  check(false, op, list, "[", i, "]", parts...);
}

void check_length(const StepLists& lists, const char* name, const Tensors& list) {
  const size_t count = lists.grads.size();
  if (list.size() != count)
    check(false, lists.op, name, " must have as many tensors as ", lists.direction ? "grads, " : "params, ", count,
          ", got ", list.size());
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const int64_t dims = a.dim();
  if (b.dim() != dims) return false;
  for (int64_t d = 0; d < dims; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

void check_state(const char* op, const MomentList& list, size_t i, Codec codec, int64_t n, int64_t blocks,
                 bool quantized) {
  const Tensor &state = list.state[i], &scale = list.scale[i];
  const ScalarType type = quantized ? ScalarType::Byte : ScalarType::Float;
  const int64_t count = quantized ? code_count(list.is_v ? codec::second_moment(codec) : codec, n) : n;
  if (state.scalar_type() != type || state.numel() != count || !state.is_contiguous())
    fail(op, list.name, i, " must be contiguous ", show(type), " with ", count, " elements, got ",
         show(state.scalar_type()), " ", show(state));
  const int64_t scales = quantized ? blocks : 0;
  if (scale.scalar_type() != ScalarType::Float || scale.numel() != scales || !scale.is_contiguous())
    fail(op, list.scale_name, i, " must be contiguous float32 with ", scales, " elements, got ",
         show(scale.scalar_type()), " ", show(scale));
}

// Views of tensor i. `copies` keeps a contiguous copy of the gradient alive where it has to be made.
cpu::StepTensor step_tensor(const StepLists& lists, size_t i, Codec codec, int64_t block, Tensors& copies) {
  const char* op = lists.op;
  const Tensor &p = lists.params[i], &g = lists.grads[i];
  const char* const name = lists.direction ? "out" : "params";
  const ScalarType type = g.scalar_type(), p_type = p.scalar_type();
  if (!is_float(lists.direction ? type : p_type))
    fail(op, lists.direction ? "grads" : "params", i, " must be float32, bfloat16 or float16, got ",
         show(lists.direction ? type : p_type));
  if (!p.is_contiguous()) fail(op, name, i, " must be contiguous");
  if (!lists.direction && type != p_type)
    fail(op, "grads", i, " must have its parameter's dtype ", show(p_type), ", got ", show(type));
  if (lists.direction && p_type != type && p_type != ScalarType::Float)
    fail(op, "out", i, " must have its gradient's dtype ", show(type), " or float32, got ", show(p_type));
  if (!same_shape(g, p)) {
    if (lists.direction) fail(op, "out", i, " must have its gradient's shape ", show(g), ", got ", show(p));
    fail(op, "grads", i, " must have its parameter's shape ", show(p), ", got ", show(g));
  }
  cpu::StepTensor t = {};
  t.n = p.numel();
  t.index = uint32_t(i);
  t.dtype = dtype_of(op, "grads", g);
  const ScalarType state_type = lists.moments[0].state[i].scalar_type();
  const bool quantized = state_type == ScalarType::Byte;
  if (!quantized && state_type != ScalarType::Float)
    fail(op, lists.moments[0].name, i, " must be uint8 (quantized) or float32, got ", show(state_type));
  const int64_t blocks = ceil_div(t.n, block);
  for (const MomentList& list : lists.moments) {
    check_state(op, list, i, codec, t.n, blocks, quantized);
    t.*(list.slot) = {list.state[i].mutable_data_ptr(),
                      quantized ? static_cast<float*>(list.scale[i].mutable_data_ptr()) : nullptr};
  }
  if (!lists.master_lo.empty()) {
    const Tensor& low = lists.master_lo[i];
    const ScalarType low_type = low.scalar_type();
    if (p_type != ScalarType::BFloat16)
      fail(op, "params", i, " must be bfloat16 to have a master_lo, got ", show(p_type));
    if ((low_type != ScalarType::Short && low_type != ScalarType::Char) || low.numel() != t.n || !low.is_contiguous())
      fail(op, "master_lo", i, " must be contiguous int16 or int8 with ", t.n, " elements, got ", show(low_type), " ",
           show(low));
    t.low = low.mutable_data_ptr();
    t.low_bits = low_type == ScalarType::Short ? 16 : 8;
  }
  t.g = g.const_data_ptr();
  if (!g.is_contiguous()) {
    copies.push_back(torch::stable::contiguous(g));
    t.g = copies.back().const_data_ptr();
  }
  if (lists.direction) {
    t.out = p.mutable_data_ptr();
    t.out_dtype = dtype_of(op, "out", p);
  } else {
    t.p = p.mutable_data_ptr();
  }
  return t;
}

float scalar_of(const char* op, const char* name, const Tensor& t) {
  if (t.numel() != 1 || t.scalar_type() != ScalarType::Float)
    check(false, op, name, " must be a float32 tensor with one element, got ", show(t.scalar_type()), " ", show(t));
  return *t.const_data_ptr<float>();
}

// parallel_for over the blocks of all tensors as one list, so that many small tensors are as parallel as a large one.
int64_t run(const std::vector<cpu::StepTensor>& tensors, const cpu::StepCall& call, StepKernel kernel) {
  std::vector<int64_t> first(tensors.size() + 1, 0);  // the first block of each tensor in the flattened list
  for (size_t i = 0; i < tensors.size(); ++i) first[i + 1] = first[i] + ceil_div(tensors[i].n, call.block);
  std::atomic<int64_t> kept{0};
  parallel_for(first.back(), grain_blocks(call.block), [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    int64_t found = 0;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (begin < stop) found += kernel(tensors[i], call, {begin - first[i], stop - first[i]});
      begin = std::max(begin, stop);
    }
    if (found) kept += found;
  });
  return kept;
}

}  // namespace

void run_step(const StepLists& lists, const StepTensors& in, const StepOptions& options, Codec codec, int64_t block,
              StepKernel kernel) {
  const char* op = lists.op;
  check_block(op, block);
  check_rounding(op, in.round_mode, in.rng);
  if (lists.direction)
    check_length(lists, "out", lists.params);
  else if (lists.params.size() != lists.grads.size())
    check(false, op, "grads must have as many tensors as params, ", lists.params.size(), ", got ", lists.grads.size());
  for (const MomentList& list : lists.moments) {
    check_length(lists, list.name, list.state);
    check_length(lists, list.scale_name, list.scale);
  }
  if (!lists.master_lo.empty()) check_length(lists, "master_lo", lists.master_lo);

  Tensors copies;
  std::vector<cpu::StepTensor> tensors(lists.grads.size());
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = step_tensor(lists, i, codec, block, copies);
  const float t = scalar_of(op, "step", *in.step), lr = in.lr ? scalar_of(op, "lr", *in.lr) : 0.0f;
  const float beta3 = in.beta3 ? scalar_of(op, "beta3", *in.beta3) : 0.0f;
  const float alpha = in.alpha ? scalar_of(op, "alpha", *in.alpha) : 0.0f;
  const float scale = in.grad_scale ? scalar_of(op, "grad_scale", *in.grad_scale) : 1.0f;
  int64_t* counter = nullptr;
  if (in.nonfinite) {
    check(in.nonfinite->scalar_type() == ScalarType::Long && in.nonfinite->numel() == 1, op,
          "nonfinite must be an int64 tensor with one element, got ", show(in.nonfinite->scalar_type()), " ",
          show(*in.nonfinite));
    counter = in.nonfinite->mutable_data_ptr<int64_t>();
  }
  if (in.found_inf && scalar_of(op, "found_inf", *in.found_inf) != 0) {
    if (lists.direction)
      for (const Tensor& out : lists.params) torch::stable::zero_(const_cast<Tensor&>(out));
    return;
  }
  cpu::StepCall call = {};
  call.scalars = step_scalars(options, t, lr, scale, beta3, alpha);
  call.rule = options.rule;
  call.codec = codec;
  call.block = block;
  call.stochastic = in.round_mode == 1;
  if (call.stochastic) call.random = random_key(in.rng);
  const int64_t kept = run(tensors, call, kernel);
  if (counter) *counter += kept;
}

}  // namespace slk::optim
