// Run-time choice of an instruction set. Every family has a table of functions, compiled once per ISA in the namespace
// slk::cpu::<isa>; `table()` functions below return the one for this machine.
//
// The choice is made once: the best set that both the binary and the CPU have, or the one that the environment variable
// SLKERNELS_CPU_ISA (generic | avx2 | avx512) names, for tests and comparisons.
#pragma once

#include <string>
#include <vector>

namespace slk::cpu {

enum class Isa { generic, avx2, avx512 };

Isa active_isa();
const char* isa_name(Isa isa);
std::vector<std::string> compiled_isas();

}  // namespace slk::cpu
