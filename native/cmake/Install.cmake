# What C++ users get: the public headers, libllm_datadist.so, a CMake package and a pkg-config file. Every path among
# them is relative: the tree may be moved, and inside a wheel it lies wherever the Python package does.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

if(SKBUILD)
  # The Python package is the prefix; vllm_datadist_connector/cpp.py tells where it is.
  set(prefix vllm_datadist_connector/)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
  install(TARGETS _native LIBRARY DESTINATION ${prefix})
else()
  set(prefix "")
endif()
foreach(dir CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR)
  if(IS_ABSOLUTE "${${dir}}")
    message(FATAL_ERROR "${dir} is '${${dir}}'; allowed: a path relative to the prefix (the installation is relocatable)")
  endif()
endforeach()
set(library_dir ${prefix}${CMAKE_INSTALL_LIBDIR})
set(include_dir ${prefix}${CMAKE_INSTALL_INCLUDEDIR})
set(package_dir ${library_dir}/cmake/llm_datadist)
set(pkgconfig_dir ${library_dir}/pkgconfig)

install(
  TARGETS llm_datadist
  EXPORT llm_datadist
  LIBRARY DESTINATION ${library_dir}
  INCLUDES DESTINATION ${include_dir})
install(DIRECTORY include/ge include/llm_datadist DESTINATION ${include_dir} FILES_MATCHING PATTERN "*.h")

# The export is the whole package: the library depends on nothing that a user would have to find.
install(EXPORT llm_datadist NAMESPACE llm_datadist:: FILE llm_datadistConfig.cmake DESTINATION ${package_dir})
set(version_file ${CMAKE_CURRENT_BINARY_DIR}/llm_datadistConfigVersion.cmake)
write_basic_package_version_file(${version_file} COMPATIBILITY SameMinorVersion)
install(FILES ${version_file} DESTINATION ${package_dir})

file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/llm_datadist.pc.in llm_datadist.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/llm_datadist.pc DESTINATION ${pkgconfig_dir})
