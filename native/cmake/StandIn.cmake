# Libraries that stand in for CANN's, see tests/standin/README.md. Each lies where the provider finds it by its path, the
# ones it needs beside it.
set(standin_folder ${CMAKE_CURRENT_SOURCE_DIR}/tests/standin)
set(standin_output ${CMAKE_CURRENT_BINARY_DIR}/standin)

function(datadist_add_standin target name folder)
  add_library(${target} SHARED ${ARGN})
  target_include_directories(${target} PRIVATE ${standin_folder})
  target_link_libraries(${target} PRIVATE datadist_options)
  target_compile_options(${target} PRIVATE -O0)
  set_target_properties(
    ${target} PROPERTIES LIBRARY_OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY ${standin_output}/${folder}
                         BUILD_RPATH "$ORIGIN;${standin_output}")
endfunction()

datadist_add_standin(standin_metadef metadef . ${standin_folder}/metadef.cc)
# As CANN is built.
target_compile_definitions(standin_metadef PRIVATE _GLIBCXX_USE_CXX11_ABI=0)
datadist_add_standin(standin_ascendcl ascendcl . ${standin_folder}/ascendcl.cc)

set(standin_map ${standin_folder}/libllm_datadist.map)
datadist_add_standin(
  standin_datadist llm_datadist . ${standin_folder}/endpoint.cc ${standin_folder}/exports.cc
  ${standin_folder}/late_writes.cc ${standin_folder}/rules.cc)
target_link_libraries(standin_datadist PRIVATE datadist_provider standin_metadef standin_ascendcl)
target_link_options(standin_datadist PRIVATE ${DATADIST_SHARED_LINK_OPTIONS} -Wl,--version-script=${standin_map})
set_target_properties(standin_datadist PROPERTIES LINK_DEPENDS ${standin_map})

datadist_add_standin(standin_v1 llm_engine . ${standin_folder}/v1.cc)
target_link_libraries(standin_v1 PRIVATE -Wl,--no-as-needed standin_metadef)
datadist_add_standin(standin_incomplete llm_datadist incomplete ${standin_folder}/v1.cc)
target_compile_definitions(standin_incomplete PRIVATE STANDIN_INCOMPLETE)
target_link_libraries(standin_incomplete PRIVATE -Wl,--no-as-needed standin_metadef)

add_custom_target(standin DEPENDS standin_datadist standin_v1 standin_incomplete)
