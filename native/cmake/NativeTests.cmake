# One executable per tests/*_test.cc, so that a crash or a leak names its file; every TEST is a ctest test of its own
# process. Other sources under tests/ are support code that all of them link. A test with a main() of its own (a second
# process started from the same binary) simply has one: gtest_main gives way.
find_package(GTest REQUIRED)
include(GoogleTest)

file(GLOB test_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/*_test.cc)
file(GLOB_RECURSE support_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/*.cc)
list(REMOVE_ITEM support_sources ${test_sources})

set(test_libraries datadist_provider)
if(support_sources)
  add_library(datadist_test_support STATIC ${support_sources})
  target_include_directories(datadist_test_support PUBLIC tests)
  target_link_libraries(datadist_test_support PUBLIC datadist_provider GTest::gmock GTest::gtest)
  set(test_libraries datadist_test_support ${test_libraries})
endif()

foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE tests)
  target_link_libraries(${name} PRIVATE ${test_libraries} GTest::gmock GTest::gtest GTest::gtest_main)
  # Listing tests after linking runs the binary once; with a sanitizer and on a busy machine the default 5 s are short.
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 120)
endforeach()
