#!/usr/bin/env bash
# Build the engine for aarch64 on another machine and run its C++ tests under qemu.
#
#   bash scripts/check_aarch64.sh [options]
#
#   --jobs N       compile N files at a time (default: as many as there are processors)
#   --sanitize     with ASan and UBSan, into build/aarch64-sanitize
#   -h, --help     show this text
#
# Needs aarch64-linux-gnu-g++, qemu-aarch64, cmake and a Python >= 3.10, and installs none of them. Builds to
# build/aarch64, the C library and swin_run too, without PyTorch and the tests of the CUDA kernels. The kernels are tested
# thrice: on a processor with the 8-bit matrix instructions, where the engine has to find neon_i8mm, on one with no more than
# the dot product, and on one without both, where only portable is left.
# What qemu takes says nothing about an ARM processor's speed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

jobs="$(nproc)" build=build/aarch64 flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    --jobs)
      [ $# -ge 2 ] || usage_error "$0" "$1 needs a value"
      jobs="$2"
      shift
      ;;
    --sanitize)
      build=build/aarch64-sanitize flags=(-DSWIN_SANITIZE=ON)
      export ASAN_OPTIONS=detect_leaks=0 # which does not work under qemu
      ;;
    -h | --help)
      usage_from "$0"
      exit 0
      ;;
    *) usage_error "$0" "unknown option '$1'" ;;
  esac
  shift
done
case "$jobs" in *[!0-9]* | "" | 0) usage_error "$0" "--jobs needs a positive number, found '$jobs'" ;; esac
cd "$SWIN_ROOT"

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || missing+=("aarch64-linux-gnu-g++ (Debian/Ubuntu: apt install g++-aarch64-linux-gnu)")
command -v qemu-aarch64 >/dev/null 2>&1 || missing+=("qemu-aarch64 (Debian/Ubuntu: apt install qemu-user)")
PATH="$(venv_dir)/bin:$PATH"
command -v cmake >/dev/null 2>&1 || missing+=("cmake (run scripts/build_ft.sh, which puts it into .venv; or apt install cmake)")
command -v ctest >/dev/null 2>&1 || missing+=("ctest (comes with cmake)")
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}" >&2
  die "aarch64 cannot be checked on this machine without what is missing above. Install it and run this again."
fi
python="$(find_python)"
generator=()
if command -v ninja >/dev/null 2>&1 && [ ! -f "$build/Makefile" ]; then generator=(-G Ninja); fi

run_step "Configuring for aarch64" "Remove $build and try again." \
  cmake -S . -B "$build" "${generator[@]}" "${flags[@]}" -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake -DSWIN_TORCH=OFF \
  -DPython_EXECUTABLE="$python"
run_step "Compiling for aarch64" "The compiler's message is in that log." \
  cmake --build "$build" --parallel "$jobs" --target test_runtime test_cpu_kernels test_engine_file test_resize swin_run
ctest --test-dir "$build" --output-on-failure --no-tests=error --tests-regex '^(runtime|cpu_kernels|engine_file|resize)$'
said="$(qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/bin/swin_run" --version)"
[ -n "$said" ] || die "swin_run --version says nothing on aarch64. It loads $build/lib/libswin_int8_c.so."

# variants_on CPU: what test_cpu_kernels says it ran, one line, on qemu's CPU; it fails where the test does.
variants_on() { qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$1" "$build/bin/test_cpu_kernels" "${@:2}"; }

# needs CPU NAMES: the instruction sets found on that processor.
needs() {
  local found
  found="$(variants_on "$1" --variants)"
  [ "$found" = "$2" ] || die "on qemu's '$1' the engine finds '$found'; '$2' is needed. See has_i8mm and has_dotprod in csrc/cpu/backend.cc."
}
needs max "neon_i8mm neon_dotprod portable"
needs neoverse-n1 "neon_dotprod portable"
needs cortex-a53 "portable"
for cpu in neoverse-n1 cortex-a53; do
  run_step "Kernels on $cpu" "Its words are in that log." variants_on "$cpu"
done
say "aarch64: all passed"
