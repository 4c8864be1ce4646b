// The lists of a multi-tensor step, checked: what adam_q_, adam_q_dir_, ademamix_q_ and momentum_q_ share.
#pragma once

#include "torch/optim.h"

namespace slk::optim {

struct MomentList {
  const char *name, *scale_name;
  const Tensors &state, &scale;
  cpu::Moment cpu::StepTensor::* slot;
  bool is_v;
};

// The tensors of a call. `grads` sets shapes and dtypes; `params` (or, for a direction, `out`) are written.
struct StepLists {
  const char* op;
  const Tensors &params, &grads;
  std::vector<MomentList> moments;
  const Tensors& master_lo;
  bool direction;
};

// Device scalars and options.
struct StepTensors {
  const Tensor* step;
  const Tensor *lr, *beta3, *alpha;  // null where the op has none
  const std::optional<Tensor>&grad_scale, &found_inf, rng, &nonfinite;
  int64_t round_mode;
};

using StepKernel = int64_t (*)(const cpu::StepTensor&, const cpu::StepCall&, Range);

void run_step(const StepLists& lists, const StepTensors& tensors, const StepOptions& options, Codec codec,
              int64_t block, StepKernel kernel);

}  // namespace slk::optim
