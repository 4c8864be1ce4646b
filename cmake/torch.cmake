# torch_stable: torch's headers and libtorch.so, without find_package(Torch), which would drag in CUDA checks,
# architecture flags and ABI defines that a stable-ABI extension has no use for.
if(NOT SLKERNELS_TORCH_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -c
                  "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE missing ERROR_QUIET)
  if(missing)
    message(FATAL_ERROR "slkernels: no torch for ${Python_EXECUTABLE}. Install torch >= 2.10 and build with "
                        "--no-build-isolation, or set SLKERNELS_TORCH_DIR to a torch package folder.")
  endif()
else()
  set(torch_dir ${SLKERNELS_TORCH_DIR})
endif()
if(NOT EXISTS ${torch_dir}/include/torch/csrc/stable/library.h)
  message(FATAL_ERROR "slkernels: ${torch_dir} has no stable-ABI headers; torch >= 2.10 is needed.")
endif()
message(STATUS "slkernels: torch headers from ${torch_dir}")
set(torch_has_cuda OFF)
if(EXISTS ${torch_dir}/lib/libtorch_cuda.so)
  set(torch_has_cuda ON)
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_dir}/include)
# The oldest torch the binary runs on: 2.10. Also turns every unstable torch header into an #error.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# torch's checks put the header's path into their messages: not that of the machine that built the wheel.
target_compile_options(torch_stable INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${torch_dir}=torch>)
# libtorch.so is a shell that needs libtorch_cpu.so, and libtorch_cuda.so in CUDA builds. --no-as-needed keeps it in
# DT_NEEDED: torch opens its libraries RTLD_LOCAL, so that nothing else would bring their symbols into scope.
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE ${torch_dir}/lib/libtorch.so)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH "$ORIGIN/../torch/lib")
