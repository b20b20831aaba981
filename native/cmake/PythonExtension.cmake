# _native: the engine linked in, hidden. LLM_DATADIST_STATIC, --exclude-libs and the export map keep its symbols out of
# the process: a CANN library that exports the same names must neither be taken for ours nor get ours.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

file(GLOB binding_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/bindings/*.cc)
pybind11_add_module(_native MODULE NO_EXTRAS ${binding_sources})
target_compile_definitions(_native PRIVATE LLM_DATADIST_STATIC)
# To compile what each file uses of pybind11 anew would be half the time of an installation.
target_precompile_headers(_native PRIVATE <pybind11/pybind11.h> <pybind11/stl.h>)
set_target_properties(_native PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)
target_link_libraries(_native PRIVATE datadist_provider datadist_options datadist_hardening)
set(module_map ${CMAKE_CURRENT_SOURCE_DIR}/cmake/python_module.map)
target_link_options(_native PRIVATE -Wl,--exclude-libs,ALL -Wl,--version-script=${module_map})
set_target_properties(_native PROPERTIES LINK_DEPENDS ${module_map})
if(DATADIST_SANITIZE STREQUAL "")
  target_link_options(_native PRIVATE -Wl,-z,relro,-z,now)
endif()
if(SKBUILD)
  target_link_options(_native PRIVATE -Wl,--strip-debug)
endif()
