// The step kernels' entry points for this instruction set, one a translation unit.
#pragma once

#include "slkernels/optim.h"

namespace slk::cpu::SLK_ISA {

int64_t step_adam(const StepTensor&, const StepCall&, Range blocks);
int64_t step_ademamix(const StepTensor&, const StepCall&, Range blocks);
int64_t step_momentum(const StepTensor&, const StepCall&, Range blocks);

}  // namespace slk::cpu::SLK_ISA
