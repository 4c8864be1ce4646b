# slkernels_flags: warnings and hardening for every host translation unit.
add_library(slkernels_flags INTERFACE)
set(host_cxx $<COMPILE_LANGUAGE:CXX>)
target_compile_options(slkernels_flags INTERFACE
  $<${host_cxx}:-Wall> $<${host_cxx}:-Wextra> $<${host_cxx}:-fstack-protector-strong>)
if(SLKERNELS_WERROR)
  target_compile_options(slkernels_flags INTERFACE $<${host_cxx}:-Werror>)
endif()
if(SLKERNELS_SANITIZE)
  target_compile_options(slkernels_flags INTERFACE
    $<${host_cxx}:-fsanitize=address,undefined> $<${host_cxx}:-fno-sanitize-recover=all>
    $<${host_cxx}:-fno-omit-frame-pointer> $<${host_cxx}:-g>)
  target_link_options(slkernels_flags INTERFACE -fsanitize=address,undefined)
else()
  # _FORTIFY_SOURCE wants an optimised build; some distributions' compilers predefine it.
  target_compile_options(slkernels_flags INTERFACE
    $<$<AND:${host_cxx},$<NOT:$<CONFIG:Debug>>>:-U_FORTIFY_SOURCE>
    $<$<AND:${host_cxx},$<NOT:$<CONFIG:Debug>>>:-D_FORTIFY_SOURCE=2>)
endif()
# Full RELRO, and no text relocations.
target_link_options(slkernels_flags INTERFACE -Wl,-z,relro,-z,now,-z,noexecstack)
