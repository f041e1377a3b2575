#!/usr/bin/env bash
# Build the INT8 Swin engine: from a bare machine with python >= 3.10, g++ and git to an engine that Python can load.
#
#   bash scripts/build_ft.sh [options]
#
# Makes .venv unless a virtual environment is active, installs the package and what it needs, applies the patch series
# to a copy of the FT graph and builds both graphs. Nothing that is up to date is done again.
#
#   --cpu-only         leave CUDA out even where an nvcc is found
#   --cuda-arch LIST   GPU architectures to build for, e.g. "80;89;90"
#   --clean            remove what was built before (not .venv) and build anew
#   --jobs N           compile N files at a time (default: one per core, one per 2 GiB of memory)
#   --sanitize         build with ASan and UBSan into build/sanitize, for the tests; the installed engine stays
#   -h, --help         show this text
#
# Environment: PYTHON, the Python to make .venv with; CXX, the C++ compiler (default g++). pip's own variables hold, e.g.
# PIP_INDEX_URL for a mirror.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cpu_only=0 clean=0 sanitize=0 jobs="" cuda_arch=""
while [ $# -gt 0 ]; do
  case "$1" in
    --cpu-only) cpu_only=1 ;;
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
case "$jobs" in *[!0-9]* | 0) usage_error "$0" "--jobs needs a positive number, found '$jobs'" ;; esac
[ "$cpu_only" = 0 ] || [ -z "$cuda_arch" ] || usage_error "$0" "--cpu-only and --cuda-arch exclude each other"
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
  run_step "install the build tools" "$todo" "$python" -m pip install -c "$constraints" \
    "scikit-build-core>=0.10" "cmake>=3.24" "ninja>=1.11"
  # Without wheel.cmake the editable install is Python only; CMake builds the engine below, incrementally.
  run_step "install the package and its dependencies (PyTorch: several GB the first time)" "$todo" \
    "$python" -m pip install -c "$constraints" --no-build-isolation \
    -Cwheel.cmake=false -Ceditable.mode=inplace -e '.[build,test]'
  printf '%s\n' "$wanted" >"$stamp"
}

# --- engine ----------------------------------------------------------------------------------------------------------

note_about_cuda() {
  local nvcc
  nvcc="$(command -v nvcc || true)"
  if [ -n "$cuda_arch" ]; then
    [ -n "$nvcc" ] || die "--cuda-arch $cuda_arch was given but nvcc is not on PATH. It compiles the CUDA backend. Install the CUDA toolkit, or leave the option out."
    say "note: the CUDA backend is not written yet; --cuda-arch $cuda_arch is passed on, the engine is built for the CPU (SWIN_CUDA=OFF)"
  elif [ -n "$nvcc" ] && [ "$cpu_only" = 0 ]; then
    say "note: found nvcc, but the CUDA backend is not written yet; the engine is built for the CPU (SWIN_CUDA=OFF)"
  fi
}

build_engine() {
  local kind=release flags=() configured wanted todo
  [ "$sanitize" = 0 ] || kind=sanitize
  build="build/$kind"
  flags=("-DCMAKE_CXX_COMPILER=$cxx" "-DPython_EXECUTABLE=$python" -DSWIN_CUDA=OFF "-DCMAKE_MAKE_PROGRAM=$venv/bin/ninja")
  [ "$sanitize" = 0 ] || flags+=(-DSWIN_SANITIZE=ON)
  [ -z "$cuda_arch" ] || flags+=("-DCMAKE_CUDA_ARCHITECTURES=$cuda_arch")
  [ "$clean" = 0 ] || rm -rf "$build"
  # Ninja configures again by itself when a CMakeLists.txt changes; only other options or another PyTorch need it from here.
  configured="$build/.configured"
  wanted="$(printf '%s\n' "${flags[@]}" "$(cat "$venv/.swin-int8-installed")" | digest)"
  if [ ! -f "$build/build.ninja" ] || [ "$(cat "$configured" 2>/dev/null || true)" != "$wanted" ]; then
    run_step "configure the $kind build" "If the compiler or PyTorch changed, try again with --clean." \
      "$venv/bin/cmake" -S . -B "$build" -G Ninja "${flags[@]}"
  fi
  rm -f "$configured" # a build that is killed may leave half-written build files; the next run configures again
  todo="If the compiler was killed, there was too little memory: try --jobs 1. If it is stale, try --clean. See docs/troubleshooting.md."
  run_step "build the engine ($kind, ${jobs:-$(default_jobs)} jobs)" "$todo" \
    "$venv/bin/cmake" --build "$build" --parallel "${jobs:-$(default_jobs)}"
  printf '%s\n' "$wanted" >"$configured"
  if [ "$sanitize" = 0 ]; then
    run_step "install the engine into pyharness/_lib" "$todo" \
      "$venv/bin/cmake" --install "$build" --component engine --prefix "$SWIN_ROOT"
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
make_venv
install_dependencies
note_about_cuda
build_engine
check_engine
