#!/usr/bin/env bash
# Build the INT8 Swin engine: from a bare machine with python >= 3.10, g++ and git to an engine that Python can load.
#
#   bash scripts/build_ft.sh [options]
#
# Makes .venv unless a virtual environment is active, installs the package and what it needs, applies the patch series
# to a copy of the FT graph and builds both graphs. Nothing that is up to date is done again. Where an nvcc is found the CUDA
# backend is built too; that needs no GPU.
#
#   --cpu-only         leave CUDA out even where an nvcc is found
#   --cuda-arch LIST   GPU architectures to build for: "80;89;90", native (this machine's GPUs) or all (Turing to Blackwell);
#                      default: native where there is a GPU, else 80 with PTX, which newer GPUs compile when they load it
#   --offline          take the active Python as it is, with its PyTorch, cmake and ninja, and install nothing
#   --clean            remove what was built before (not .venv) and build anew
#   --jobs N           compile N files at a time (default: one per core, one per 2 GiB of memory)
#   --sanitize         build with ASan and UBSan into build/sanitize, for the tests; the installed engine stays
#   -h, --help         show this text
#
# Environment: PYTHON, the Python to make .venv with (with --offline: to use); CXX, the C++ compiler (default g++); CUDA_HOME,
# the CUDA toolkit where nvcc is not on PATH; SWIN_CUTLASS_DIR, a CUTLASS checkout in the place of the package nvidia-cutlass;
# SWIN_WGMMA_JOBS, how many of Hopper's CUTLASS files, 7 GB each, compile at a time (default: one for every 8 GB of memory).
# pip's own variables hold, e.g. PIP_INDEX_URL for a mirror.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cpu_only=0 clean=0 sanitize=0 offline=0 jobs="" cuda_arch=""
while [ $# -gt 0 ]; do
  case "$1" in
    --cpu-only) cpu_only=1 ;;
    --offline) offline=1 ;;
    --clean) clean=1 ;;
    --sanitize) sanitize=1 ;;
    --cuda-arch | --jobs)
      [ $# -ge 2 ] || usage_error "$0" "$1 needs a value"
      if [ "$1" = --jobs ]; then jobs="$2"; else cuda_arch="$2"; fi
      shift
      ;;
    -h | --help)
      usage_from "$0"
      exit 0
      ;;
    *) usage_error "$0" "unknown option '$1'" ;;
  esac
  shift
done
case "${SWIN_WGMMA_JOBS:-}" in
  *[!0-9]* | 0*) die "SWIN_WGMMA_JOBS is '$SWIN_WGMMA_JOBS'; it needs a positive number. Unset it for one job for every 8 GB of memory." ;;
esac
case "$jobs" in *[!0-9]* | 0) usage_error "$0" "--jobs needs a positive number, found '$jobs'" ;; esac
[ "$cpu_only" = 0 ] || [ -z "$cuda_arch" ] || usage_error "$0" "--cpu-only and --cuda-arch exclude each other"
case "$cuda_arch" in
  "" | all | native) ;;
  *[!0-9\;]* | \;* | *\; | *\;\;*) usage_error "$0" "--cuda-arch needs all, native or numbers like \"80;90\", found '$cuda_arch'" ;;
esac
cd "$SWIN_ROOT"

# --- tools -----------------------------------------------------------------------------------------------------------

check_tools() {
  command -v git >/dev/null 2>&1 ||
    die "git is not on PATH. It applies the patch series (patches/) to the graph. Install it (Debian/Ubuntu: apt install git)."
  cxx="${CXX:-g++}"
  command -v "$cxx" >/dev/null 2>&1 ||
    die "the C++ compiler '$cxx' is not on PATH. It builds the engine. Install it (Debian/Ubuntu: apt install g++) or set CXX."
  "$cxx" -std=c++20 -fsyntax-only -x c++ - <<<'int main() { return 0; }' >/dev/null 2>&1 ||
    die "'$cxx' does not compile C++20 ($("$cxx" --version 2>&1 | head -n 1)). The engine and PyTorch's headers need g++ >= 11 or clang >= 14. Install one or set CXX."
}

default_jobs() {
  local cores memory
  cores="$(nproc)"
  memory="$(awk '/^MemAvailable:/ { print int($2 / 2097152) }' /proc/meminfo 2>/dev/null || true)"
  memory="${memory:-$cores}"
  [ "$memory" -ge 1 ] || memory=1
  echo $((cores < memory ? cores : memory))
}

# --- Python environment ----------------------------------------------------------------------------------------------

make_venv() {
  venv="$(venv_dir)"
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    [ -x "$venv/bin/python" ] ||
      die "VIRTUAL_ENV names '$venv', which has no bin/python. Activate a working environment, or deactivate to use .venv."
    python_is_new_enough "$venv/bin/python" ||
      die "the active environment '$venv' has $("$venv/bin/python" --version 2>&1); Python >= $SWIN_MIN_PYTHON is needed. Deactivate it to use .venv."
  elif ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    local base
    base="$(find_python)"
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
      die "$base has no venv module. It makes .venv. Install it (Debian/Ubuntu: apt install python3-venv) or set PYTHON to another Python."
    run_step "make .venv with $("$base" --version)" "Remove .venv and try again." "$base" -m venv --clear "$venv"
  fi
  python="$venv/bin/python"
}

# Installs dependencies only when pyproject.toml, the constraints or the place of the checkout changed since the last time.
install_dependencies() {
  local stamp="$venv/.swin-int8-installed" wanted constraints=requirements/constraints.txt
  wanted="$(printf '%s' "$SWIN_ROOT" | digest pyproject.toml "$constraints")"
  [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ] || return 0
  local todo="Is the network there? pip's settings hold (PIP_INDEX_URL, PIP_PROXY); then run this script again."
  # pip itself too: a venv of Debian 12 or Ubuntu 22.04 brings one that does not know -C yet.
  run_step "install the build tools" "$todo" "$python" -m pip install -c "$constraints" \
    "pip>=23.1" "scikit-build-core>=0.11" "cmake>=3.24" "ninja>=1.11"
  start_early_build
  # Without wheel.cmake the editable install is Python only; CMake builds the engine below, incrementally.
  run_step "install the package and its dependencies (PyTorch: several GB the first time)" "$todo" \
    "$python" -m pip install -c "$constraints" --no-build-isolation \
    -Cwheel.cmake=false -Ceditable.mode=inplace -e '.[build,test]'
  printf '%s\n' "$wanted" >"$stamp"
  [ -z "$early" ] || run_step "compile what needs none of them" "$todo" await_early_build
}

# --offline: the active environment, else $PYTHON or the first Python on PATH, as it is.
take_python() {
  venv="${VIRTUAL_ENV:-}"
  if [ -n "$venv" ]; then
    python="$venv/bin/python"
    [ -x "$python" ] ||
      die "VIRTUAL_ENV names '$venv', which has no bin/python. Activate a working environment, or deactivate it."
  else
    python="$(find_python)"
  fi
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    die "--offline: $python has no PyTorch. The engine is built against it. Activate an environment that has it, or leave --offline out."
}

# tool NAME: prints the program NAME of the Python in use, else the one on PATH.
tool() {
  local found
  for found in "$(dirname "$python")/$1" "$(command -v "$1" || true)"; do
    if [ -n "$found" ] && [ -x "$found" ]; then
      printf '%s\n' "$found"
      return
    fi
  done
  die "$1 is neither beside $python nor on PATH. It builds the engine. Install it (pip install $1)$([ "$offline" = 0 ] || printf ', or leave --offline out')."
}

# --- CUDA ------------------------------------------------------------------------------------------------------------

# The last release of CUTLASS's headers on PyPI. Needed to build alone, and without its own dependencies.
CUTLASS_PACKAGE="nvidia-cutlass==4.2.0.0"

# no_cuda WHY: CUDA was asked for and cannot be had: an error; otherwise a note, and the build goes on without it.
no_cuda() {
  [ -z "$cuda_arch" ] || die "--cuda-arch $cuda_arch was given, but $1"
  say "note: no CUDA backend: $1"
}

find_nvcc() {
  local found
  for found in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [ -n "$found" ] && [ -x "$found" ]; then
      printf '%s\n' "$found"
      return
    fi
  done
}

# Compute capabilities of this machine's GPUs, without the dot and with ; between them. Nothing where there is none.
native_architectures() {
  {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || {
      # Not on PATH: PyTorch knows as well, but takes seconds to ask, so only where there is a driver.
      [ -e /dev/nvidiactl ] && "$python" -c '
import torch
for device in range(torch.cuda.device_count()):
    print("{}.{}".format(*torch.cuda.get_device_capability(device)))' 2>/dev/null
    } || true
  } |
    awk '/^[0-9]+\.[0-9]$/ { sub(/\./, ""); if (!seen[$0]++) { printf "%s%s", sep, $0; sep = ";" } }'
}

# Sets `nvcc` (empty: no CUDA backend) and `architectures`.
choose_cuda() {
  nvcc="" architectures=""
  [ "$cpu_only" = 0 ] && [ "$sanitize" = 0 ] || return 0
  local found torch_cuda nvcc_version native
  found="$(find_nvcc)"
  if [ -z "$found" ]; then
    [ -z "$cuda_arch" ] || no_cuda "there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda. It compiles the CUDA backend. Install the CUDA toolkit, or leave the option out."
    return 0
  fi
  torch_cuda="$("$python" "$SWIN_ROOT/cmake/find_cuda_packages.py" | awk -F= '$1 == "torch_cuda" { print $2 }')"
  nvcc_version="$("$found" --version | awk '/release/ { sub(/.*release /, ""); sub(/,.*/, ""); print }')"
  if [ -z "$torch_cuda" ]; then
    no_cuda "the PyTorch of $python was built without CUDA. Install PyTorch with CUDA, or use --cpu-only."
    return 0
  elif [ "${torch_cuda%%.*}" != "${nvcc_version%%.*}" ]; then
    no_cuda "nvcc is $nvcc_version ($found) and PyTorch has CUDA $torch_cuda; both must be of one major version. Set CUDA_HOME to a toolkit ${torch_cuda%%.*}.x, or use --cpu-only."
    return 0
  fi
  architectures="$cuda_arch"
  if [ -z "$architectures" ] || [ "$architectures" = native ]; then
    native="$(native_architectures)"
    if [ -z "$native" ] && [ "$cuda_arch" = native ]; then
      die "--cuda-arch native was given, but neither nvidia-smi nor PyTorch finds a GPU on this machine. Name the architecture, e.g. --cuda-arch 90."
    fi
    architectures="${native:-80}"
  fi
  nvcc="$found"
  local named="sm_${architectures//;/, sm_}"
  [ "$architectures" != all ] || named="all architectures"
  say "CUDA backend: nvcc $nvcc_version for $named"
}

install_cutlass() {
  [ -n "$nvcc" ] && [ -z "${SWIN_CUTLASS_DIR:-}" ] || return 0
  ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("cutlass_library") is None)' || return 0
  if [ "$offline" = 0 ] && "$python" -m pip install --quiet --no-deps "$CUTLASS_PACKAGE" >/dev/null 2>&1; then
    say "installed $CUTLASS_PACKAGE (headers, to build with)"
  else
    say "note: CUTLASS's headers are missing (pip install --no-deps $CUTLASS_PACKAGE, or SWIN_CUTLASS_DIR); the CUDA backend is built with cuBLASLt alone"
  fi
}

# --- engine ----------------------------------------------------------------------------------------------------------

# What says that the Python packages changed: the stamp of the install, or PyTorch's version where nothing is installed.
installed_packages() {
  if [ "$offline" = 1 ]; then
    "$python" -c 'import importlib.metadata, sys; print(sys.executable, importlib.metadata.version("torch"))'
  else
    cat "$venv/.swin-int8-installed"
  fi
}

# Sets `cmake` and `flags`, those that no package has a say in.
choose_flags() {
  local ninja
  cmake="$(tool cmake)"
  ninja="$(tool ninja)"
  flags=("-DCMAKE_CXX_COMPILER=$cxx" "-DPython_EXECUTABLE=$python" "-DCMAKE_MAKE_PROGRAM=$ninja")
  # The tests of the CUDA kernels on the host run with sanitizers alone: without them they find less, at the same optimization level.
  if [ "$sanitize" = 1 ]; then flags+=(-DSWIN_SANITIZE=ON); else flags+=(-DSWIN_HOST_TESTS=OFF); fi
}

# While packages are unpacked, on one core: the part of the engine that needs none of them. In a process group of its own, so
# that all of it can be stopped. Should it fail, the build itself will and say so.
start_early_build() {
  local cmake flags
  [ ! -f "$build/build.ninja" ] || return 0
  choose_flags
  set -m
  { nice "$cmake" -S . -B "$build" -G Ninja "${flags[@]}" -DSWIN_TORCH=OFF -DSWIN_CUDA=OFF &&
    nice "$cmake" --build "$build" --target swin_engine --parallel "${jobs:-$(default_jobs)}"; } >/dev/null 2>&1 </dev/null &
  early=$!
  set +m
}

await_early_build() {
  wait "$early" || true
  early=""
}

stop_early_build() {
  [ -n "$early" ] || return 0
  kill -- "-$early" 2>/dev/null || true
  wait "$early" 2>/dev/null || true
}

build_engine() {
  local configured wanted todo cmake flags
  choose_flags
  flags+=(-DSWIN_TORCH=ON)
  if [ -n "$nvcc" ]; then
    flags+=(-DSWIN_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DSWIN_CUDA_ARCHITECTURES=$architectures"
      "-DSWIN_CUTLASS_DIR=${SWIN_CUTLASS_DIR:-}" "-DSWIN_WGMMA_JOBS=${SWIN_WGMMA_JOBS:-}")
  else
    flags+=(-DSWIN_CUDA=OFF)
  fi
  # Ninja configures again by itself when a CMakeLists.txt changes; only other options or another PyTorch need it from here.
  configured="$build/.configured"
  # The third: CUTLASS, cuBLASLt and PyTorch's CUDA, where they are part of the build.
  wanted="$(printf '%s\n' "${flags[@]}" "$(installed_packages)" "${nvcc:+$("$python" cmake/find_cuda_packages.py)}" | digest)"
  if [ ! -f "$build/build.ninja" ] || [ "$(cat "$configured" 2>/dev/null || true)" != "$wanted" ]; then
    run_step "configure the $kind build" "If the compiler or PyTorch changed, try again with --clean." \
      "$cmake" -S . -B "$build" -G Ninja "${flags[@]}"
  fi
  rm -f "$configured" # a build that is killed may leave half-written build files; the next run configures again
  todo="If the compiler was killed, there was too little memory: try --jobs 1. If it is stale, try --clean. See docs/troubleshooting.md."
  run_step "build the engine ($kind, ${jobs:-$(default_jobs)} jobs)" "$todo" \
    "$cmake" --build "$build" --parallel "${jobs:-$(default_jobs)}"
  printf '%s\n' "$wanted" >"$configured"
  if [ "$sanitize" = 0 ]; then
    run_step "install the engine into pyharness/_lib" "$todo" \
      "$cmake" --install "$build" --component engine --prefix "$SWIN_ROOT"
  fi
}

# Loads the new engine once, in a process of its own, and keeps what it says of itself beside the build.
check_engine() {
  local library=pyharness/_lib/libswin_int8.so checked="$build/.checked" digest_now
  if [ "$sanitize" = 1 ]; then
    say "sanitizer engine: $build/lib/libswin_int8.so (load it with SWIN_INT8_LIBRARY; scripts/test.sh does)"
    return
  fi
  digest_now="$(digest "$library" </dev/null)"
  if [ "$(head -n 1 "$checked" 2>/dev/null || true)" != "$digest_now" ]; then
    run_step "load the engine" "Try again with --clean." "$python" -c '
import json, sys
from pyharness.engine import engine_info
with open(sys.argv[1], "w") as file:
    print(sys.argv[2], json.dumps(engine_info(), sort_keys=True), sep="\n", file=file)' "$checked" "$digest_now"
  fi
  say "engine: $library"
  say "        $(tail -n 1 "$checked")"
  say "use it with: ${python#"$SWIN_ROOT"/} pyharness/reproduce_table2.py"
}

check_tools
kind=release early=""
[ "$sanitize" = 0 ] || kind=sanitize
build="build/$kind"
[ "$clean" = 0 ] || rm -rf "$build"
trap stop_early_build EXIT
if [ "$offline" = 1 ]; then
  take_python
else
  make_venv
  install_dependencies
fi
choose_cuda
install_cutlass
build_engine
check_engine
