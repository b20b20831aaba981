# Fuzz targets: fuzz_NAME for each fuzz/NAME_fuzz.cc, see fuzz/README.md. Under ctest each replays what it begins from
# and what was found before, then tries changed inputs: always the same ones, so that a failure is a change's.
option(DATADIST_FUZZ_COVERAGE "Compile the engine so that the fuzz targets see what an input reaches" OFF)

file(GLOB fuzz_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/*_fuzz.cc)
set(fuzz_seeds ${CMAKE_CURRENT_BINARY_DIR}/fuzz/seeds)
set(fuzz_findings ${CMAKE_CURRENT_BINARY_DIR}/fuzz/findings)
file(MAKE_DIRECTORY ${fuzz_findings})
# A few seconds each with the sanitizers; what one run of CI can spare.
set(fuzz_runs 200000)

add_library(fuzz_common INTERFACE)
target_include_directories(fuzz_common INTERFACE ${CMAKE_CURRENT_SOURCE_DIR})
target_link_libraries(fuzz_common INTERFACE datadist_provider datadist_options)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  set(coverage_flag -fsanitize=fuzzer-no-link)
  set(fuzz_driver -fsanitize=fuzzer)
else()
  set(coverage_flag -fsanitize-coverage=trace-pc)
  add_library(fuzz_coverage STATIC fuzz/coverage.cc)
  target_include_directories(fuzz_coverage PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_link_libraries(fuzz_coverage PRIVATE datadist_options)
  add_library(fuzz_driver STATIC fuzz/standalone_main.cc fuzz/mutate.cc)
  target_link_libraries(fuzz_common INTERFACE fuzz_coverage)
  target_link_libraries(fuzz_driver PRIVATE fuzz_common)
  set(fuzz_driver fuzz_driver)
endif()
if(DATADIST_FUZZ_COVERAGE)
  target_compile_options(datadist_objects PRIVATE ${coverage_flag})
endif()

add_executable(fuzz_seeds fuzz/seeds.cc)
target_link_libraries(fuzz_seeds PRIVATE fuzz_common)
add_custom_target(fuzz DEPENDS fuzz_seeds)
add_test(NAME fuzz_seeds COMMAND fuzz_seeds ${fuzz_seeds})
set_tests_properties(fuzz_seeds PROPERTIES FIXTURES_SETUP fuzz_seeds)

foreach(source ${fuzz_sources})
  get_filename_component(file ${source} NAME_WE)
  string(REGEX REPLACE "_fuzz$" "" name ${file})
  add_executable(fuzz_${name} ${source})
  target_link_libraries(fuzz_${name} PRIVATE fuzz_common ${fuzz_driver})
  add_dependencies(fuzz fuzz_${name})
  add_test(
    NAME fuzz_${name}
    COMMAND fuzz_${name} -seed=1 -runs=${fuzz_runs} -artifact_prefix=${fuzz_findings}/${name}- ${fuzz_seeds}/${name}
            ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/corpus/${name})
  set_tests_properties(fuzz_${name} PROPERTIES FIXTURES_REQUIRED fuzz_seeds TIMEOUT 120)
endforeach()

# libFuzzer has tests of its own.
if(TARGET fuzz_driver)
  add_executable(fuzz_planted fuzz/driver/planted.cc)
  target_link_libraries(fuzz_planted PRIVATE fuzz_common ${fuzz_driver})
  add_dependencies(fuzz fuzz_planted)
  add_test(
    NAME fuzz_driver
    COMMAND ${CMAKE_COMMAND} -DDRIVER=$<TARGET_FILE:fuzz_planted> -DFOLDER=${CMAKE_CURRENT_BINARY_DIR}/fuzz/driver -P
            ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/driver/check.cmake)
endif()
