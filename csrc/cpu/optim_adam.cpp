// adam_q_ and adam_q_dir_. Contract: slkernels/optim.h.
#include "cpu/optim_kernel.h"

namespace slk::cpu::SLK_ISA {

int64_t step_adam(const StepTensor& t, const StepCall& call, Range blocks) {
  return t.out ? step_rule<Rule::adam_direction>(t, call, blocks) : step_rule<Rule::adam>(t, call, blocks);
}

}  // namespace slk::cpu::SLK_ISA
