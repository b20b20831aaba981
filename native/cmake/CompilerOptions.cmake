# datadist_options: how every target of ours is compiled. Nothing of it reaches those who use the public headers.
add_library(datadist_options INTERFACE)
target_compile_features(datadist_options INTERFACE cxx_std_17)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

target_compile_options(datadist_options INTERFACE -Wall -Wextra -Wconversion -Wshadow)
if(DATADIST_WERROR)
  target_compile_options(datadist_options INTERFACE -Werror)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Statics of inline functions would be process-wide even where hidden, shared with a second copy of the engine.
  target_compile_options(datadist_options INTERFACE -fno-gnu-unique)
endif()

if(DATADIST_SANITIZE STREQUAL "")
  # Bytes from peers reach this code: a slip must end in a crash, not in silent corruption.
  target_compile_options(datadist_options INTERFACE -fstack-protector-strong)
  target_compile_definitions(datadist_options INTERFACE _GLIBCXX_ASSERTIONS)
  set(DATADIST_SHARED_LINK_OPTIONS -Wl,-z,relro,-z,now -Wl,-z,defs)
elseif(DATADIST_SANITIZE STREQUAL "address")
  set(sanitizers address,undefined)
elseif(DATADIST_SANITIZE STREQUAL "thread")
  set(sanitizers thread)
else()
  message(FATAL_ERROR "DATADIST_SANITIZE is '${DATADIST_SANITIZE}'; allowed: empty, 'address', 'thread'")
endif()

if(sanitizers)
  target_compile_options(
    datadist_options INTERFACE -fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${sanitizers})
  if(DATADIST_SANITIZE STREQUAL "thread" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC warns that TSan does not model fences. Ours order memory against readers in other processes, which it cannot
    # see either.
    target_compile_options(datadist_options INTERFACE -Wno-tsan)
  endif()
endif()

# datadist_hardening: for what is shipped only. The C library warns of _FORTIFY_SOURCE without optimization, which would
# fail the build of the tests.
add_library(datadist_hardening INTERFACE)
if(DATADIST_SANITIZE STREQUAL "" AND CMAKE_BUILD_TYPE STREQUAL "Release")
  target_compile_options(datadist_hardening INTERFACE -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2)
endif()
