# slkernels_cuda: csrc/cuda/*.cu (hand-written) and csrc/cutlass/*.cu, static CUDA runtime, no libcuda.
set(SLKERNELS_HAS_CUDA OFF)
set(SLKERNELS_CUDA_ARCHS_BUILT "")
if(SLKERNELS_CUDA STREQUAL "OFF")
  return()
endif()

# nvcc alone is not a reason: a machine with neither a GPU nor a CUDA build of torch gains nothing from the CUDA half.
if(SLKERNELS_CUDA STREQUAL "AUTO" AND NOT torch_has_cuda AND NOT EXISTS /dev/nvidia0)
  message(STATUS "slkernels: CUDA half left out (no GPU and a CPU-only torch; SLKERNELS_CUDA=ON forces it)")
  return()
endif()

# The toolkit's own installers put nvcc where no PATH leads.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(SLKERNELS_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin)
  if(SLKERNELS_NVCC)
    set(ENV{CUDACXX} ${SLKERNELS_NVCC})
  endif()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(SLKERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "slkernels: SLKERNELS_CUDA=ON, but no working nvcc was found (set CUDACXX)")
  endif()
  message(STATUS "slkernels: CUDA half left out (no working nvcc found)")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${SLKERNELS_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# sm_90a came with 12.0; the runtime function that finds the driver's tensor-map encoder without -lcuda with 12.5.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)
  if(SLKERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "slkernels: needs nvcc >= 12.5, found ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  message(STATUS "slkernels: CUDA half left out (needs nvcc >= 12.5, found ${CMAKE_CUDA_COMPILER_VERSION})")
  return()
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cutlass_sources CONFIGURE_DEPENDS csrc/cutlass/*.cu)
# Files named *_sm90.cu use instructions of sm_90a alone (TMA, wgmma, setmaxnreg), which ptxas refuses for any other
# target, and run only there: they are compiled for it and nothing else. Object libraries, because architectures are a
# property of targets.
set(sm90_sources ${cuda_sources})
list(FILTER sm90_sources INCLUDE REGEX "_sm90\\.cu$")
list(FILTER cuda_sources EXCLUDE REGEX "_sm90\\.cu$")
add_library(slkernels_cuda_sm90 OBJECT ${sm90_sources})
set_target_properties(slkernels_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a)

# CUTLASS instances, all of them for sm_90a. One takes more than a minute and 5 GB to compile: with Ninja, as many at once
# as have 12 GB of this machine each.
include(cmake/cutlass.cmake)
cmake_host_system_information(RESULT memory_mib QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR cutlass_jobs "${memory_mib} / 12288")
if(cutlass_jobs LESS 1)
  set(cutlass_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS slkernels_cutlass=${cutlass_jobs})
add_library(slkernels_cutlass OBJECT ${cutlass_sources})
set_target_properties(slkernels_cutlass PROPERTIES CUDA_ARCHITECTURES 90a JOB_POOL_COMPILE slkernels_cutlass)
target_include_directories(slkernels_cutlass SYSTEM PRIVATE ${SLKERNELS_CUTLASS_INCLUDE})

add_library(slkernels_cuda STATIC ${cuda_sources} $<TARGET_OBJECTS:slkernels_cuda_sm90>
            $<TARGET_OBJECTS:slkernels_cutlass>)
# -lineinfo, for profilers, puts the text of the PTX beside the machine code, which makes up more than half of an
# uncompressed binary. Compressed, all images take a seventh, and the runtime unpacks a module when it loads it.
foreach(target slkernels_cuda slkernels_cuda_sm90 slkernels_cutlass)
  target_include_directories(${target} PUBLIC include PRIVATE csrc)
  target_include_directories(${target} SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Xfatbin=-compress-all
                         -Xcompiler=-Wall,-Wextra,-fstack-protector-strong>)
  if(SLKERNELS_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endforeach()
target_compile_definitions(slkernels_cuda INTERFACE SLKERNELS_WITH_CUDA)
set(SLKERNELS_HAS_CUDA ON)
list(JOIN SLKERNELS_CUDA_ARCHITECTURES "," SLKERNELS_CUDA_ARCHS_BUILT)  # a ";" would split the compile definition
