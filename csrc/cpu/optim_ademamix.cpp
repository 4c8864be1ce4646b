// ademamix_q_. Contract: slkernels/optim.h.
#include "cpu/optim_kernel.h"

namespace slk::cpu::SLK_ISA {

int64_t step_ademamix(const StepTensor& t, const StepCall& call, Range blocks) {
  return step_rule<Rule::ademamix>(t, call, blocks);
}

}  // namespace slk::cpu::SLK_ISA
