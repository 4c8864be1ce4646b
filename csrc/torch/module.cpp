// The Python module slkernels._C: what the binary is. Loading it also registers the ops' implementations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/common/isa.h"
#include "slkernels/semi24_gemm.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string hex(unsigned long long value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%016llx", value);
  return text;
}

py::dict build_info() {
  py::dict info;
  info["version"] = SLKERNELS_VERSION;
  info["commit"] = SLKERNELS_COMMIT;
  info["compiler"] = kCompiler;
#ifdef SLKERNELS_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = SLKERNELS_CUDA_ARCHS;
  info["torch_abi_target"] = hex(TORCH_TARGET_VERSION);
  info["cpu_isa"] = slk::cpu::isa_name(slk::cpu::active_isa());
  info["cpu_isas"] = slk::cpu::compiled_isas();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of slkernels.";
  m.def("build_info", &build_info);
  m.def("sparse_pays24", &slk::sparse_pays24, py::arg("tokens"), py::arg("n"), py::arg("m"));
}
