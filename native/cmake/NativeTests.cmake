# One executable per tests/*_test.cc, so that a crash or a leak names its file; every TEST is a ctest test of its own
# process. Other sources under tests/ are support code that all of them link. A test with a main() of its own (a second
# process started from the same binary) simply has one: gtest_main gives way.
find_package(GTest REQUIRED)
include(GoogleTest)

file(GLOB test_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/*_test.cc)
file(GLOB_RECURSE support_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/*.cc)
list(REMOVE_ITEM support_sources ${test_sources})
list(FILTER support_sources EXCLUDE REGEX "/tests/standin/")

# Threads are what TSan looks for: tests that start none say nothing under it.
if(DATADIST_SANITIZE STREQUAL "thread")
  set(alone askers cache_model cache_registry channel_messages frame json_check moves options plan ranges tcp_wire)
  list(JOIN alone "|" alone)
  list(FILTER test_sources EXCLUDE REGEX "/(${alone})_test\\.cc$")
endif()

add_library(datadist_test_support STATIC ${support_sources})
target_include_directories(datadist_test_support PUBLIC tests)
target_link_libraries(datadist_test_support PUBLIC datadist_provider GTest::gmock GTest::gtest)
# Tests load these while they run.
add_dependencies(datadist_test_support standin llm_datadist)

# To optimize every test and to compile GoogleTest's headers anew for each would take most of the time of a run.
if(DATADIST_SANITIZE STREQUAL "address")
  # UBSan's checks of a test's own code take a third of its compilation. The engine's code has them.
  set(fewer_checks -fno-sanitize=undefined)
endif()
set(header_owner "")
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  # Of the source: what the target's own options say comes before those of the libraries, and the last one holds.
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${fewer_checks}")
  target_compile_options(${name} PRIVATE -O0)
  target_link_libraries(${name} PRIVATE datadist_test_support GTest::gtest_main)
  if(header_owner)
    target_precompile_headers(${name} REUSE_FROM ${header_owner})
  else()
    target_precompile_headers(${name} PRIVATE <gmock/gmock.h> <gtest/gtest.h>)
    set(header_owner ${name})
  endif()
  # Listing tests after linking runs the binary once; with a sanitizer and on a busy machine the default 5 s are short.
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 120)
endforeach()

# The layout that CANN's library expects of us is checked by the compiler: here with both ABIs of std::string, and for the
# hosts that most NPUs have where such a compiler is installed.
set(abi_flags -std=c++17 -Wall -Wextra -Werror -fsyntax-only -I${CMAKE_CURRENT_SOURCE_DIR}/src -x c++
              ${CMAKE_CURRENT_SOURCE_DIR}/src/provider/cann/convert.cc -I${CMAKE_CURRENT_SOURCE_DIR}/include)
foreach(abi 0 1)
  add_test(NAME cann_abi_strings_${abi} COMMAND ${CMAKE_CXX_COMPILER} -D_GLIBCXX_USE_CXX11_ABI=${abi} ${abi_flags})
endforeach()
find_program(DATADIST_AARCH64_CXX aarch64-linux-gnu-g++)
if(DATADIST_AARCH64_CXX)
  add_test(NAME cann_abi_aarch64 COMMAND ${DATADIST_AARCH64_CXX} ${abi_flags})
else()
  message(STATUS "No aarch64-linux-gnu-g++ (package g++-aarch64-linux-gnu): the ABI of CANN is not checked for aarch64")
endif()
