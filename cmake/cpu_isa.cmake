# slkernels_cpu: every csrc/cpu/*.cpp is compiled once per instruction set, in a namespace of its own (SLK_ISA).
# csrc/cpu/common/*.cpp is compiled once, for the baseline; its isa.cpp picks one set at run time.
set(isa_names generic)
set(isa_flags_generic "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND isa_names avx2 avx512)
  set(isa_flags_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512)
endif()

file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
file(GLOB cpu_common_sources CONFIGURE_DEPENDS csrc/cpu/common/*.cpp)

add_library(slkernels_cpu STATIC ${cpu_common_sources})
target_include_directories(slkernels_cpu PUBLIC include PRIVATE csrc)
target_link_libraries(slkernels_cpu PRIVATE slkernels_flags)
if(SLKERNELS_SANITIZE)
  set(isa_optimise -O1)  # the unrolled loops of -O3, each access checked, take minutes to compile
else()
  set(isa_optimise -O3)
endif()
foreach(isa IN LISTS isa_names)
  add_library(slkernels_cpu_${isa} OBJECT ${cpu_sources})
  target_include_directories(slkernels_cpu_${isa} PRIVATE include csrc)
  target_compile_definitions(slkernels_cpu_${isa} PRIVATE SLK_ISA=${isa})
  # -O3: the panel loops need full unrolling. -fno-math-errno: sqrt becomes one instruction; results stay IEEE.
  # -ffp-contract=fast: a*b+c on vector types becomes one FMA.
  # -Wno-uninitialized, -Wno-maybe-uninitialized: GCC's own AVX-512 headers trip them (GCC bug 105593).
  target_compile_options(slkernels_cpu_${isa} PRIVATE ${isa_flags_${isa}} ${isa_optimise} -fno-math-errno -ffp-contract=fast
                         -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
  target_link_libraries(slkernels_cpu_${isa} PRIVATE slkernels_flags)
  target_sources(slkernels_cpu PRIVATE $<TARGET_OBJECTS:slkernels_cpu_${isa}>)
  string(TOUPPER ${isa} upper)
  target_compile_definitions(slkernels_cpu PRIVATE SLK_HAVE_${upper})
endforeach()
