# CUTLASS headers: SLKERNELS_CUTLASS_DIR, then third_party/cutlass, then PyPI's nvidia-cutlass, then a clear error.
execute_process(COMMAND ${Python_EXECUTABLE} -c
  "import importlib.util as u, pathlib as p; s = u.find_spec('cutlass_library'); print(p.Path(s.origin).parent / 'source' if s else '')"
  OUTPUT_VARIABLE cutlass_from_pip OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_path(SLKERNELS_CUTLASS_INCLUDE cutlass/cutlass.h NO_DEFAULT_PATH
  PATHS ${SLKERNELS_CUTLASS_DIR} ${CMAKE_SOURCE_DIR}/third_party/cutlass ${cutlass_from_pip}
  PATH_SUFFIXES include "")
if(NOT SLKERNELS_CUTLASS_INCLUDE)
  message(FATAL_ERROR "slkernels: csrc/cutlass needs CUTLASS headers: set SLKERNELS_CUTLASS_DIR, put a checkout in "
                      "third_party/cutlass, or `pip install --no-deps nvidia-cutlass==4.2.0.0`")
endif()
