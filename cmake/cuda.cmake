# The CUDA backend: target swin_cuda, a static library, with SWIN_HAVE_CUDA for whoever links it.
# Included by CMakeLists.txt where SWIN_CUDA is on. Needs nvcc of CUDA 12.4 or later; no GPU.
#
#   SWIN_CUDA_ARCHITECTURES   "all" (the list below), or compute capabilities without the dot: "80;90"
#   SWIN_CUTLASS_DIR          a CUTLASS checkout, where the Python package nvidia-cutlass is not used
#   SWIN_WGMMA_JOBS           how many of Hopper's CUTLASS files compile at a time (empty: one for every 8 GB of memory)
#   CUDA_HOME (environment)   the toolkit, where nvcc is not on PATH
#
# nvcc's own headers compile the kernels. cuBLASLt's header and the libraries to link are those of the packages that
# PyTorch loads, so that one copy of each is in the process; where PyTorch has none, the toolkit's.

set(SWIN_CUDA_ARCHITECTURES "all" CACHE STRING "GPU architectures: all, or compute capabilities such as 80;90")
set(SWIN_CUTLASS_DIR "" CACHE PATH "CUTLASS checkout (empty: the Python package nvidia-cutlass)")
set(SWIN_WGMMA_JOBS "" CACHE STRING "Hopper's CUTLASS files at a time (empty: one for every 8 GB of memory)")

# --- nvcc ------------------------------------------------------------------------------------------------------------

if(NOT CMAKE_CUDA_COMPILER)
  find_program(SWIN_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  if(NOT SWIN_NVCC)
    message(FATAL_ERROR "SWIN_CUDA=ON: there is no nvcc on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin. It compiles "
                        "the CUDA backend. Install the CUDA toolkit, set CUDA_HOME, or configure with -DSWIN_CUDA=OFF.")
  endif()
  set(CMAKE_CUDA_COMPILER ${SWIN_NVCC})
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target below has its own
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # linked below, from PyTorch's packages
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "SWIN_CUDA=ON: ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}; "
                      "nvcc 12.4 or later is needed. Set CUDA_HOME to a newer toolkit.")
endif()

# --- architectures ---------------------------------------------------------------------------------------------------

# All, with the reason for each:
#   75   Turing (T4): the first with s8 tensor cores; mma.sync m8n8k16
#   80   Ampere (A100): cp.async and mma.sync m16n8k32
#   86   Ampere (A10, RTX 30): as 80 with 100 KiB of shared memory; scheduled for its own pipelines
#   89   Ada (RTX 4090, L4, L40): the paper's GPU
#   90   Hopper (H100, H200): wgmma in its CUTLASS file, which alone is compiled for 90a
#   100  Blackwell (B200): mma.sync kernels and cuBLASLt; its code also runs on 10.3
#   120  Blackwell (RTX 50, RTX PRO), also for 12.1
# and PTX of the newest, which the driver compiles for what comes later. 10.3 (B300) has no s8 tensor-core rate worth
# using: INT8 runs there, slower than FP8 or FP16. 7.0 (V100) has no s8 tensor cores at all.
set(all_architectures 75 80 86 89 90 100 120)

execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE nvcc_knows ERROR_QUIET)
set(cuda_architectures)
if(SWIN_CUDA_ARCHITECTURES STREQUAL "all")
  foreach(arch ${all_architectures})
    if(nvcc_knows MATCHES "compute_${arch}\n")
      list(APPEND cuda_architectures ${arch})
    else()
      message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know sm_${arch}; left out")
    endif()
  endforeach()
else()
  foreach(arch ${SWIN_CUDA_ARCHITECTURES})
    if(NOT arch MATCHES "^[0-9]+$" OR arch LESS 75)
      message(FATAL_ERROR "SWIN_CUDA_ARCHITECTURES: '${arch}' is no architecture to build for; \"all\", or compute "
                          "capabilities from 75 on without the dot are needed, such as \"80;90\".")
    elseif(NOT nvcc_knows MATCHES "compute_${arch}\n")
      message(FATAL_ERROR "SWIN_CUDA_ARCHITECTURES: nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER}) does not "
                          "compile for sm_${arch}. Use a newer toolkit (CUDA_HOME), or leave that architecture out.")
    endif()
    list(APPEND cuda_architectures ${arch})
  endforeach()
endif()
list(REMOVE_DUPLICATES cuda_architectures)
list(SORT cuda_architectures COMPARE NATURAL)
list(GET cuda_architectures -1 newest_architecture)
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, sm ${cuda_architectures}, PTX of ${newest_architecture}")

# Machine code for each of `cuda_architectures` within [first, last], and PTX of the newest where it is one of them.
function(code_for first last out)
  set(code)
  foreach(arch ${cuda_architectures})
    if(arch GREATER_EQUAL first AND arch LESS_EQUAL last)
      list(APPEND code ${arch}-real)
      if(arch EQUAL newest_architecture)
        list(APPEND code ${arch}-virtual)
      endif()
    endif()
  endforeach()
  set(${out} ${code} PARENT_SCOPE)
endfunction()

# --- packages --------------------------------------------------------------------------------------------------------

execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_cuda_packages.py
                RESULT_VARIABLE status OUTPUT_VARIABLE answer ERROR_VARIABLE error)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "SWIN_CUDA=ON: ${Python_EXECUTABLE} could not be asked for its packages:\n${error}")
endif()
function(answer_of name out)
  string(REGEX MATCH "(^|\n)${name}=([^\n]*)" _ "${answer}")
  set(${out} "${CMAKE_MATCH_2}" PARENT_SCOPE)
endfunction()
answer_of(torch_cuda torch_cuda)
answer_of(cudart cudart)
answer_of(cublaslt cublaslt)
answer_of(cublas_include cublas_include)

if(SWIN_TORCH AND NOT torch_cuda)
  message(FATAL_ERROR "SWIN_CUDA=ON: the PyTorch of ${Python_EXECUTABLE} was built without CUDA, so its tensors cannot be on "
                      "a GPU. Install PyTorch with CUDA, or configure with -DSWIN_CUDA=OFF.")
endif()
string(REGEX MATCH "^[0-9]+" torch_major "${torch_cuda}")
string(REGEX MATCH "^[0-9]+" nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
if(SWIN_TORCH AND NOT torch_major EQUAL nvcc_major)
  message(FATAL_ERROR "SWIN_CUDA=ON: nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, PyTorch has CUDA ${torch_cuda}. Both must be of "
                      "one major version, since they share one libcudart. Set CUDA_HOME to a toolkit ${torch_major}.x.")
endif()

# The toolkit's, where PyTorch's packages lack something (PyTorch of a distribution, or none).
get_filename_component(toolkit "${CMAKE_CUDA_COMPILER_LIBRARY_ROOT}" REALPATH)
set(toolkit_libs ${toolkit}/lib64 ${toolkit}/lib ${toolkit}/targets/x86_64-linux/lib ${toolkit}/targets/sbsa-linux/lib)
if(NOT cudart)
  find_library(SWIN_CUDART cudart HINTS ${toolkit_libs})
  set(cudart ${SWIN_CUDART})
endif()
if(NOT cudart)
  message(FATAL_ERROR "SWIN_CUDA=ON: libcudart.so is neither among the packages of ${Python_EXECUTABLE} (nvidia-cuda-runtime) "
                      "nor in ${toolkit}.")
endif()
if(NOT cublaslt OR NOT cublas_include)
  find_library(SWIN_CUBLASLT cublasLt HINTS ${toolkit_libs})
  find_path(SWIN_CUBLAS_INCLUDE cublasLt.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  if(SWIN_CUBLASLT AND SWIN_CUBLAS_INCLUDE)
    set(cublaslt ${SWIN_CUBLASLT})
    set(cublas_include ${SWIN_CUBLAS_INCLUDE})
  endif()
endif()
if(SWIN_CUTLASS_DIR)
  set(cutlass ${SWIN_CUTLASS_DIR})
  if(EXISTS ${SWIN_CUTLASS_DIR}/include/cutlass/version.h)
    set(cutlass ${SWIN_CUTLASS_DIR}/include)
  endif()
  if(NOT EXISTS ${cutlass}/cutlass/version.h)
    message(FATAL_ERROR "SWIN_CUTLASS_DIR=${SWIN_CUTLASS_DIR} holds no include/cutlass/version.h: it is no CUTLASS checkout.")
  endif()
else()
  answer_of(cutlass cutlass)
endif()

# --- targets ---------------------------------------------------------------------------------------------------------

# Machine code for many architectures repeats itself: a quarter of the bytes. Drivers older than CUDA 12.4's cannot read it, and
# CUDA 13 runs with none of those.
set(compress)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  set(compress --compress-mode=size)
endif()

# C++17, which every nvcc and CMake in range knows. Takes off what CMakeLists.txt adds for the C++ compiler.
function(compile_with_nvcc target)
  set_target_properties(${target} PROPERTIES COMPILE_OPTIONS "" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                             CUDA_EXTENSIONS OFF)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/csrc/include ${CMAKE_SOURCE_DIR}/csrc/cuda)
  target_compile_options(${target} PRIVATE "SHELL:-Xcompiler -Wall" "SHELL:-Xcompiler -fmacro-prefix-map=${CMAKE_SOURCE_DIR}/="
                                           --expt-relaxed-constexpr ${compress} ${ARGN})
endfunction()

# One file an op, grouped; the CUTLASS and cuBLASLt files have their own conditions below.
file(GLOB cuda_kernels CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
file(GLOB cuda_host CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cc)
list(FILTER cuda_kernels EXCLUDE REGEX "/gemm_cutlass[^/]*$")
list(FILTER cuda_host EXCLUDE REGEX "/gemm_cu[^/]*$")
code_for(75 999 code)
include(cmake/cuda_groups.cmake)
group_cuda_kernels()
add_library(swin_cuda_kernels OBJECT ${cuda_kernels})
set_target_properties(swin_cuda_kernels PROPERTIES CUDA_ARCHITECTURES "${code}" UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
compile_with_nvcc(swin_cuda_kernels)

set(cuda_objects $<TARGET_OBJECTS:swin_cuda_kernels>)
set(cuda_definitions)
if(cublaslt AND cublas_include)
  list(APPEND cuda_host ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cublaslt.cc)
  list(APPEND cuda_definitions SWIN_HAVE_CUBLASLT)
  message(STATUS "CUDA: cuBLASLt of ${cublaslt}")
else()
  message(STATUS "CUDA: cuBLASLt was not found (the Python package nvidia-cublas); that GEMM provider is left out")
endif()

# nvcc takes up to 7 GB for one of Hopper's CUTLASS files (ninja heeds this; elsewhere --parallel is all there is). A
# virtual machine may say that it has less memory than it gets: SWIN_WGMMA_JOBS knows better.
if(SWIN_WGMMA_JOBS STREQUAL "")
  cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
  math(EXPR wgmma_jobs "(${memory_mb} + 1000) / 8000")
  if(wgmma_jobs LESS 1)
    set(wgmma_jobs 1)
  endif()
elseif(SWIN_WGMMA_JOBS MATCHES "^[1-9][0-9]*$")
  set(wgmma_jobs ${SWIN_WGMMA_JOBS})
else()
  message(FATAL_ERROR "SWIN_WGMMA_JOBS is '${SWIN_WGMMA_JOBS}'; a positive number of compilations at a time is needed, or "
                      "nothing, for one for every 8 GB of memory.")
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS wgmma=${wgmma_jobs})

# CUTLASS's files for each family of architectures.
function(add_cutlass_family family code)
  if(NOT code)
    return()
  endif()
  set(target swin_cuda_cutlass_${family})
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${code}")
  # NDEBUG whatever the build type: with CUTLASS's assertions in them, wgmma pipelines are serialized (ptxas C7510).
  compile_with_nvcc(${target} -O3 -DNDEBUG)
  target_include_directories(${target} SYSTEM PRIVATE ${cutlass})
  string(TOUPPER ${family} upper)
  set(cuda_objects ${cuda_objects} $<TARGET_OBJECTS:${target}> PARENT_SCOPE)
  set(cuda_definitions ${cuda_definitions} SWIN_CUTLASS_${upper} PARENT_SCOPE)
endfunction()
if(cutlass)
  list(APPEND cuda_host ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass.cc)
  list(APPEND cuda_definitions SWIN_HAVE_CUTLASS)
  code_for(75 79 code)
  add_cutlass_family(sm75 "${code}" ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm75.cu)
  code_for(80 999 code)
  add_cutlass_family(sm80 "${code}" ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm80.cu)
  code_for(90 90 code)
  if(code)
    add_cutlass_family(sm90 90a-real ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90.cu
                       ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90_pingpong.cu
                       ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90_channels_s8.cu
                       ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90_channels_gelu.cu
                       ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90_channels_f32.cu
                       ${CMAKE_SOURCE_DIR}/csrc/cuda/gemm_cutlass_sm90_channels_add.cu)
    set_target_properties(swin_cuda_cutlass_sm90 PROPERTIES JOB_POOL_COMPILE wgmma)
  endif()
  message(STATUS "CUDA: CUTLASS of ${cutlass}")
else()
  message(STATUS "CUDA: CUTLASS was not found (pip install --no-deps nvidia-cutlass, or -DSWIN_CUTLASS_DIR=...); that GEMM "
                 "provider is left out")
endif()

add_library(swin_cuda STATIC ${cuda_host} ${cuda_objects})
target_include_directories(swin_cuda PRIVATE ${CMAKE_SOURCE_DIR}/csrc/cuda)
# nvcc's headers first: PyTorch's packages have cublasLt.h, but not all of what the runtime's headers include.
target_include_directories(swin_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${cublas_include} ${cutlass})
target_compile_definitions(swin_cuda PRIVATE ${cuda_definitions} INTERFACE SWIN_HAVE_CUDA)
target_link_libraries(swin_cuda PUBLIC swin_engine PRIVATE ${cudart} ${cublaslt})
set_target_properties(swin_cuda PROPERTIES LINKER_LANGUAGE CXX)
