# The engine without Python: the shared library swin_int8_c, whose interface is csrc/include/swin_int8.h, and the program
# swin_run. `cmake --install BUILD --component runtime --prefix PREFIX` installs both, with a CMake package
# (find_package(SwinInt8), target SwinInt8::swin_int8_c); the component `engine` has them for the Python package. docs/runtime.md.
include(CheckCXXSourceCompiles)
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

add_library(swin_runtime_core STATIC csrc/runtime/engine_file.cc csrc/runtime/normalize.cc csrc/runtime/prepare.cc
                                     csrc/runtime/processors.cc csrc/runtime/resize.cc)
# Weights are computed in steps that each round, as Pillow's are: a fused multiply-add would round once.
set_source_files_properties(csrc/runtime/resize.cc csrc/runtime/prepare.cc PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
target_include_directories(swin_runtime_core PUBLIC csrc/runtime PRIVATE csrc/cpu)
target_link_libraries(swin_runtime_core PUBLIC swin_engine)
add_library(swin_int8_c SHARED csrc/runtime/capi.cc)
target_include_directories(swin_int8_c PUBLIC $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/csrc/include>
                                              $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_definitions(swin_int8_c PRIVATE SWIN_VERSION="${PROJECT_VERSION}")
target_link_libraries(swin_int8_c PRIVATE swin_runtime_core)
if(SWIN_CUDA)
  target_link_libraries(swin_int8_c PRIVATE swin_cuda)
  # Where cmake/cuda.cmake found libcudart and libcublasLt: rarely where the loader looks by itself.
  set(cuda_library_dirs)
  foreach(library ${cudart} ${cublaslt})
    get_filename_component(directory ${library} DIRECTORY)
    list(APPEND cuda_library_dirs ${directory})
  endforeach()
  list(REMOVE_DUPLICATES cuda_library_dirs)
  set_target_properties(swin_int8_c PROPERTIES INSTALL_RPATH "${cuda_library_dirs}")
endif()
# As the package's file says: until 1.0 a minor version may break what was linked with another.
set(soversion ${PROJECT_VERSION_MAJOR})
if(soversion EQUAL 0)
  set(soversion 0.${PROJECT_VERSION_MINOR})
endif()
set_target_properties(swin_int8_c PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${soversion}
                                             LINK_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/swin_int8_c.map)
# nodelete: the pool's threads outlive dlclose, and wait in the library's code.
target_link_options(swin_int8_c PRIVATE -Wl,-Bsymbolic -Wl,--as-needed -Wl,-z,nodelete
                    -Wl,--version-script=${CMAKE_CURRENT_LIST_DIR}/swin_int8_c.map)

add_executable(swin_run csrc/runtime/swin_run.cc csrc/runtime/npy.cc csrc/runtime/ppm.cc)
target_link_libraries(swin_run PRIVATE swin_int8_c)
# From the program to the library, wherever both are installed, also into one folder; one that was given as an absolute one
# stays that.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(library_dir "${CMAKE_INSTALL_LIBDIR}")
else()
  file(RELATIVE_PATH library_dir "${CMAKE_INSTALL_FULL_BINDIR}" "${CMAKE_INSTALL_FULL_LIBDIR}")
  string(PREPEND library_dir "$ORIGIN/")
endif()
set_target_properties(swin_run PROPERTIES INSTALL_RPATH "${library_dir};$ORIGIN")

# With the C++ library inside, they run on any Linux whose C library is not older. Some distributions keep it apart.
if(NOT SWIN_SANITIZE)
  set(CMAKE_REQUIRED_LINK_OPTIONS -static-libstdc++ -static-libgcc)
  check_cxx_source_compiles("#include <string>\nint main(int argc, char**) { return std::string(argc, 'a').size() == 2; }"
                            SWIN_HAVE_STATIC_LIBSTDCXX)
  unset(CMAKE_REQUIRED_LINK_OPTIONS)
  if(SWIN_HAVE_STATIC_LIBSTDCXX)
    target_link_options(swin_int8_c PRIVATE -static-libstdc++ -static-libgcc)
    target_link_options(swin_run PRIVATE -static-libstdc++ -static-libgcc)
  endif()
endif()

install(TARGETS swin_int8_c swin_run EXPORT SwinInt8
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime NAMELINK_COMPONENT runtime
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT runtime)
# The Python package has both beside the torch extension (pyharness/c_library.py). A wheel holds no links: the library has
# the name there that programs look for.
install(FILES $<TARGET_FILE:swin_int8_c> DESTINATION pyharness/_lib RENAME libswin_int8_c.so.${soversion} COMPONENT engine)
install(TARGETS swin_run RUNTIME DESTINATION pyharness/_lib COMPONENT engine)
install(FILES csrc/include/swin_int8.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT runtime)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/SwinInt8)
install(EXPORT SwinInt8 FILE SwinInt8Config.cmake NAMESPACE SwinInt8:: DESTINATION ${package_dir} COMPONENT runtime)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/SwinInt8ConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/SwinInt8ConfigVersion.cmake DESTINATION ${package_dir} COMPONENT runtime)
