// The run-time choice of an instruction set; see isa.h. Compiled once, for the baseline.
#include "cpu/common/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "slkernels/attention.h"
#include "slkernels/lowrank.h"
#include "slkernels/optim.h"
#include "slkernels/optim_norm.h"
#include "slkernels/project.h"
#include "slkernels/project_quant.h"
#include "slkernels/semi24_mask.h"
#include "slkernels/semi24_linear.h"
#include "slkernels/semi24_pack.h"
#include "slkernels/sparse.h"

namespace slk::cpu {
namespace {

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return cpu_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::generic;
}

const std::vector<Isa>& compiled() {
  static const std::vector<Isa> list = {
      Isa::generic,
#ifdef SLK_HAVE_AVX2
      Isa::avx2,
#endif
#ifdef SLK_HAVE_AVX512
      Isa::avx512,
#endif
  };
  return list;
}

Isa choose() {
  Isa best = Isa::generic;
  for (Isa isa : compiled())
    if (cpu_has(isa)) best = isa;
  const char* wanted = std::getenv("SLKERNELS_CPU_ISA");
  if (!wanted || !*wanted) return best;
  std::string names;
  for (Isa isa : compiled()) {
    if (!cpu_has(isa)) continue;
    if (std::string(wanted) == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("slkernels: SLKERNELS_CPU_ISA=" + std::string(wanted) +
                           " is not available on this machine; choose one of: " + names);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "";
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (Isa isa : compiled()) names.push_back(isa_name(isa));
  return names;
}

// ---- one line a family
// table, accessor) declares <isa>::table of every compiled ISA and defines the accessor.
#ifdef SLK_HAVE_AVX2
#define SLK_IF_AVX2(...) __VA_ARGS__
#else
#define SLK_IF_AVX2(...)
#endif
#ifdef SLK_HAVE_AVX512
#define SLK_IF_AVX512(...) __VA_ARGS__
#else
#define SLK_IF_AVX512(...)
#endif
#define SLK_TABLE(Kernels, table, accessor)                       \
  namespace generic {                                             \
  extern const Kernels table;                                     \
  }                                                               \
  SLK_IF_AVX2(namespace avx2 { extern const Kernels table; })     \
  SLK_IF_AVX512(namespace avx512 { extern const Kernels table; }) \
  const Kernels& accessor() {                                     \
    switch (active_isa()) {                                       \
      SLK_IF_AVX2(case Isa::avx2 : return avx2::table;)           \
      SLK_IF_AVX512(case Isa::avx512 : return avx512::table;)     \
      default:                                                    \
        return generic::table;                                    \
    }                                                             \
  }

SLK_TABLE(AttentionKernels, attention_table, attention_kernels)
SLK_TABLE(LowRankKernels, lowrank_table, lowrank_kernels)
SLK_TABLE(SparseKernels, sparse_table, sparse_kernels)
SLK_TABLE(OptimKernels, optim_table, optim_kernels)
SLK_TABLE(NormKernels, norm_table, norm_kernels)
SLK_TABLE(ProjectKernels, project_table, project_kernels)
SLK_TABLE(QuantKernels, quant_table, quant_kernels)
SLK_TABLE(MaskKernels, mask_table, mask_kernels)
SLK_TABLE(Semi24LinearKernels, semi24_linear_table, semi24_linear_kernels)
SLK_TABLE(Pack24Kernels, pack24_table, pack24_kernels)

}  // namespace slk::cpu
