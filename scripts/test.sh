#!/usr/bin/env bash
# Run all tests: builds what is needed, then lint, Python tests, C++ tests, and the tests of ops and C library under ASan
# and UBSan.
#
#   bash scripts/test.sh
#
# Every part runs even when one before it failed. Ends with one line per part, with what was skipped and why; the status
# is 0 only if every part passed. On a fresh machine of 2 cores it took 12 minutes (Zen 5) to 28 (Zen 3, others' work on the cores), half of
# them for downloads and compilation.

# shellcheck disable=SC2329  # functions are run by name, through `part`
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1:-}" in
  "") ;;
  -h | --help)
    usage_from "$0"
    exit 0
    ;;
  *) usage_error "$0" "unknown option '$1'" ;;
esac
cd "$SWIN_ROOT"

summary=() failed=0

# part NAME COMMAND...: runs COMMAND, notes how it ended and how long it took.
part() {
  local name="$1" started=$SECONDS outcome=passed
  shift
  printf '\n=== %s\n' "$name"
  "$@" || {
    outcome=FAILED
    failed=1
  }
  summary+=("$(printf '%-7s %4d s  %s' "$outcome" "$((SECONDS - started))" "$name")")
}

# skipped NAME WHY
skipped() { summary+=("$(printf '%-7s %6s  %s: %s' skipped "" "$1" "$2")"); }

# run_pytest REPORT ARGUMENT...: pytest in two processes, since many tests wait for processes of their own, each with half of the
# files, so that a file's fixtures are made once, until one has nothing left; leaves its count of skipped tests in the file REPORT
# (tests/python/conftest.py). One thread of PyTorch each: threads of several processes that spin for one another
# on the same cores made small trainings take five times as long and more. Tests of the engine's threads set their own number.
run_pytest() {
  local report="$1"
  shift
  env SWIN_SKIP_REPORT="$SWIN_LOGS/$report" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$python" -m pytest -q -n 2 --dist worksteal "$@"
}

# run_sanitized COMMAND...: COMMAND with the sanitizer engine and the sanitizers' run-time libraries.
# Leaks are not looked for: Python and PyTorch keep memory until the process ends, and LSan reports that as theirs.
run_sanitized() {
  LD_PRELOAD="$asan $ubsan" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    SWIN_INT8_LIBRARY="$SWIN_ROOT/build/sanitize/lib/libswin_int8.so" \
    SWIN_INT8_C_LIBRARY="$SWIN_ROOT/build/sanitize/lib/libswin_int8_c.so" run_pytest "$@"
}

# run_ctest BUILD: as many tests at a time as there are cores; the pool's, whose threads want them all, alone.
run_ctest() { "$bin/ctest" --test-dir "build/$1" --output-on-failure --no-tests=error --parallel "$(nproc)"; }

run_lint() {
  local status=0
  "$bin/ruff" check . || status=1
  "$bin/shellcheck" -x scripts/*.sh .ci/run || status=1
  return "$status"
}

bash scripts/build_ft.sh
bash scripts/build_ft.sh --sanitize
bin="$(venv_dir)/bin"
python="$bin/python"
mkdir -p "$SWIN_LOGS"
rm -f "$SWIN_LOGS"/skipped_*.txt

part "lint (ruff, shellcheck)" run_lint
# Of a folder above tests/python, pytest-xdist would not load the conftest.py that prints what was skipped.
part "Python tests (pytest -n 2 tests/python)" run_pytest skipped_tests.txt tests/python
part "C++ tests (ctest, release build)" run_ctest release
part "C++ tests (ctest, ASan + UBSan build)" run_ctest sanitize

# A sanitized library inside an unsanitized Python needs the sanitizers' libraries loaded first.
asan="$(${CXX:-g++} -print-file-name=libasan.so)" ubsan="$(${CXX:-g++} -print-file-name=libubsan.so)"
if [ -f "$asan" ] && [ -f "$ubsan" ]; then
  part "ops and C library under ASan + UBSan" run_sanitized skipped_sanitizer.txt \
    tests/python/test_ops.py tests/python/test_fused_ops.py tests/python/test_c_library.py tests/python/test_stages.py \
    tests/python/test_prepare.py
else
  skipped "ops and C library under ASan + UBSan" "${CXX:-g++} has no libasan.so or libubsan.so (Debian/Ubuntu: apt install libasan8 libubsan1)"
fi
command -v nvidia-smi >/dev/null 2>&1 || skipped "GPU tests" "no GPU on this machine (no nvidia-smi)"

printf '\n=== Summary\n'
printf '%s\n' "${summary[@]}"
cat "$SWIN_LOGS"/skipped_*.txt 2>/dev/null || true
exit "$failed"
