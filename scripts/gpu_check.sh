#!/usr/bin/env bash
# Prove and measure the CUDA backend: one command on a machine with a GPU; it needs no network.
#
#   bash scripts/gpu_check.sh [options]
#
# Parts, in this order; each is independent of the others but for the build:
#   build       scripts/build_ft.sh --offline: the engine, for this GPU
#   preflight   every GEMM candidate, in processes of their own: what breaks the GPU or hangs is left out from then on
#   tests       all GPU tests: every op against the reference, whole models against the CPU engine
#   tune        the GEMMs of every model and batch: candidates offered, proven, fastest
#   table2      Swin T / S / B / L at batch 128: FT INT8, GELU-less INT8, timm fp32 and fp16
#   table1      what each fused operation costs, in both graphs
#   sanitizer   compute-sanitizer's four tools on a small model
#   batches     Table 2 at batch 1, 8 and 32
#   peers       torch.compile fp16 max-autotune, torchao, TensorRT, as far as installed
#
#   --only LIST    these parts alone, separated by commas; one part alone gets all the time there is
#   --out FOLDER   where results, logs and summary.md go (default results/local/gpu)
#   --minutes N    begin nothing that would not end within N minutes (default 10); parts that run out of time are stopped
#                  and keep what they have
#   --runs N       rounds of the INT8 methods in Table 2 and Table 1 (default 1000, fewer where time is short)
#   --models LIST  timm names, separated by commas (default Swin T, S, B, L)
#   --pack FILE    after every part, also write everything into one archive FILE (.tar.gz)
#   -h, --help     show this text
#
# Each part's result is written as soon as it is there, and summary.md after each part. The status is 0 only if every
# part that was asked for passed. Python: the active environment, else .venv where it has PyTorch, else python3 on PATH;
# PYTHON names another. CUTLASS's headers and missing wheels can be brought along: PYTHONPATH, or SWIN_CUTLASS_DIR.
# SWIN_GEMM_SKIP holds for all parts; what the preflight finds is added to it.

# shellcheck disable=SC2329  # the parts are run by name
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ALL_PARTS="build preflight tests tune table2 table1 sanitizer batches peers"
only="" out=results/local/gpu minutes=10 runs=1000 pack=""
models="swin_tiny_patch4_window7_224,swin_small_patch4_window7_224,swin_base_patch4_window7_224,swin_large_patch4_window7_224"
while [ $# -gt 0 ]; do
  case "$1" in
    --only | --out | --minutes | --runs | --models | --pack)
      [ $# -ge 2 ] || usage_error "$0" "$1 needs a value"
      case "$1" in
        --only) only="${2//,/ }" ;;
        --out) out="$2" ;;
        --minutes) minutes="$2" ;;
        --runs) runs="$2" ;;
        --models) models="$2" ;;
        --pack) pack="$2" ;;
      esac
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
case "$minutes" in *[!0-9]* | "" | 0) usage_error "$0" "--minutes needs a positive number, found '$minutes'" ;; esac
case "$runs" in *[!0-9]* | "" | 0) usage_error "$0" "--runs needs a positive number, found '$runs'" ;; esac
for name in $only; do
  case " $ALL_PARTS " in *" $name "*) ;; *) usage_error "$0" "--only knows no part '$name'; there are: $ALL_PARTS" ;; esac
done
cd "$SWIN_ROOT"
parts="${only:-$ALL_PARTS}"
IFS=, read -r -a model_list <<<"$models"

# The most seconds a part may take in the default form; together more than there are, since most end early. Table 2 gets
# its time within 9 minutes where the engine was built before: 60 + 140 + 100 + 220. A build that is stopped ends
# everything, so it may take all there is. The tests get what they need on 16 cores, the sanitizer what its four tools
# need, and batches 12 s to start each of 12 models. A test holds the sums.
declare -A LIMIT=([build]=3600 [preflight]=60 [tests]=140 [tune]=100 [table2]=220 [table1]=90 [sanitizer]=200 [batches]=200
  [peers]=600)
LEAST=8 # seconds worth beginning a part for

find_environment() {
  if [ -n "${PYTHON:-}" ]; then
    python="$(find_python)"
  elif [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
  elif [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch' >/dev/null 2>&1; then
    python="$SWIN_ROOT/.venv/bin/python"
  else
    python="$(find_python)"
  fi
  export PYTHON="$python" PYTHONUNBUFFERED=1
}

seconds_left() { echo $((minutes * 60 - SECONDS)); }

# limit_of PART: the seconds it may take now.
limit_of() {
  local left
  left="$(seconds_left)"
  if [ "$(wc -w <<<"$parts")" = 1 ] || [ "${LIMIT[$1]}" -gt "$left" ]; then echo "$left"; else echo "${LIMIT[$1]}"; fi
}

summarize() {
  "$python" benchmarks/gpu_report.py summary "$out" || say "note: no summary could be written"
  pack_all || say "note: $pack could not be written"
}

pack_all() {
  [ -z "$pack" ] || { tar -czf "$pack.part" -C "$(dirname "$out")" "$(basename "$out")" && mv "$pack.part" "$pack"; }
}

# note PART STATUS SECONDS TEXT: a line of parts.tsv, and the summary anew.
note() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$out/parts.tsv"
  printf '%-10s %-8s %4s s  %s\n' "$1" "$2" "$3" "$4"
  case "$2" in passed) ;; *) failed=1 ;; esac
  summarize
}

# logged COMMAND...: runs it within what is left of the part's time, its output into the part's log.
logged() {
  local left=$((part_end - SECONDS)) status=0
  [ "$left" -ge 1 ] || return 124
  # In the background, as bash hears of a signal only behind what runs in the foreground.
  timeout --kill-after=10 "$left" "$@" >>"$log" 2>&1 </dev/null &
  running=$!
  wait "$running" || status=$?
  running=""
  return "$status"
}

# Stopped from outside: what runs is stopped, and there is what there is.
stopped() {
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
  summarize
  exit 143
}

# run_part NAME: runs the function part_NAME and notes how it ended. A function leaves its own words in $why.
run_part() {
  local name="$1" started=$SECONDS status=0 limit
  limit="$(limit_of "$name")"
  why="" log="$out/logs/$name.log"
  if [ "$limit" -lt "$LEAST" ]; then
    note "$name" skipped 0 "no time left; run it with --only $name"
    return
  fi
  : >"$log"
  part_end=$((SECONDS + limit))
  "part_$name" || status=$?
  case "$status" in
    0) note "$name" passed $((SECONDS - started)) "$why" ;;
    3) note "$name" skipped $((SECONDS - started)) "$why" ;;
    124 | 137) note "$name" stopped $((SECONDS - started)) "after $limit s; what it wrote stays. --only $name gives it more" ;;
    *)
      tail -n 12 "$log" | cut -c -300 >&2
      note "$name" FAILED $((SECONDS - started)) "${why:+$why; }see logs/$name.log"
      ;;
  esac
}

# worst STATUS: keeps in $status the worse of two; failing is worse than running out of time.
worst() {
  case "$1" in
    0) ;;
    124 | 137) [ "$status" != 0 ] || status=124 ;;
    *) status=1 ;;
  esac
}

# With all cores: the memory that a virtual machine says is free may be less than it gets.
part_build() {
  local status=0
  logged bash scripts/build_ft.sh --offline --jobs "$(nproc)" || status=$?
  cp "$SWIN_LOGS"/*.log "$out/logs/" 2>/dev/null || true # whole ones; the part's own has their ends
  return "$status"
}

part_preflight() {
  local status=0
  logged "$python" benchmarks/gemm_preflight.py "$out" --seconds $((part_end - SECONDS - 5)) || status=$?
  skip_what_breaks
  [ "$status" != 1 ] || why="left out from here on: ${SWIN_GEMM_SKIP:-nothing; not all could be tried}"
  return "$status"
}

# Candidates that a preflight, this run's or an earlier one's, has found to break the GPU, beside those that were named.
skip_what_breaks() {
  [ -s "$out/gemm_skip.txt" ] || return 0
  SWIN_GEMM_SKIP="${named_skip:+$named_skip,}$(paste -sd, "$out/gemm_skip.txt")"
  export SWIN_GEMM_SKIP
}

part_tests() {
  if ! "$python" -c 'import pytest, hypothesis' >/dev/null 2>&1; then
    why="pytest or hypothesis is not installed"
    return 3
  fi
  local left=$((part_end - SECONDS - 20)) # it interrupts its tests, so that they still say what failed
  logged "$python" benchmarks/gpu_tests.py "$out/logs/tests" --seconds $((left > 5 ? left : 5))
}

part_tune() {
  local code status=0
  # The large batch first, whose results matter most. What is stopped here is tuned on first use.
  logged "$python" pyharness/tune_gemm.py --model "${model_list[@]}" --batch 128 --json "$out/tune_128.json" || status=$?
  code=0
  logged "$python" pyharness/tune_gemm.py --model "${model_list[@]}" --batch 1 8 32 --json "$out/tune_small.json" ||
    code=$?
  worst "$code"
  return "$status"
}

part_table2() {
  # Two groups of methods a model; about 15 s a model go to making random weights and to warming up.
  local each=$(((part_end - SECONDS - 15 * ${#model_list[@]}) / (2 * ${#model_list[@]})))
  logged "$python" pyharness/reproduce_table2.py --device cuda --models "${model_list[@]}" --batch 128 --runs "$runs" \
    --seconds $((each > 2 ? each : 2)) --out "$out"
}

part_table1() {
  local each=$(((part_end - SECONDS - 25) / 3)) # graphs
  logged "$python" pyharness/latency_breakdown.py --device cuda --model "${model_list[0]}" --batch 128 --runs "$runs" \
    --seconds $((each > 2 ? each : 2)) --out "$out"
}

part_batches() {
  local batch code status=0 models=${#model_list[@]} each
  each=$(((part_end - SECONDS - 36 * models) / (6 * models))) # three batches, 12 s to start a model, two groups of methods
  for batch in 1 8 32; do
    code=0
    logged "$python" pyharness/reproduce_table2.py --device cuda --models "${model_list[@]}" --batch "$batch" \
      --runs "$runs" --seconds $((each > 1 ? each : 1)) --out "$out/batch$batch" || code=$?
    worst "$code"
  done
  return "$status"
}

part_sanitizer() {
  local sanitizer tool code options status=0
  sanitizer="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin" command -v compute-sanitizer || true)"
  if [ -z "$sanitizer" ]; then
    why="compute-sanitizer is not installed; it comes with the CUDA toolkit"
    return 3
  fi
  mkdir -p "$out/sanitizer"
  rm -f "$out"/sanitizer/*.txt
  logged "$python" benchmarks/sanitize_gpu.py || return "$?" # tunes its GEMMs, so that none is tuned under a tool
  for tool in memcheck synccheck racecheck initcheck; do
    code=0 options=()
    # PyTorch and cuBLASLt ask the driver for what it may not have; our own calls' statuses are looked at where they are made.
    [ "$tool" != memcheck ] || options=(--report-api-errors no)
    # initcheck sees what is read before it was written only where the engine does not clear its memory.
    logged env SWIN_CUDA_CLEAR="$([ "$tool" = initcheck ] && echo 0 || echo 1)" \
      "$sanitizer" --tool "$tool" "${options[@]}" --error-exitcode 99 --log-file "$out/sanitizer/$tool.txt" \
      "$python" benchmarks/sanitize_gpu.py || code=$?
    [ "$code" != 99 ] || why="${why:+$why, }$tool found something: sanitizer/$tool.txt"
    worst "$code"
  done
  return "$status"
}

part_peers() {
  logged "$python" benchmarks/peers_gpu.py --models "${model_list[@]}" --peers compile torchao tensorrt --batch 128 \
    --seconds 20 --out "$out/peers"
}

find_environment
mkdir -p "$out/logs"
out="$(cd "$out" && pwd)"
if [ -n "$pack" ]; then
  mkdir -p "$(dirname "$pack")"
  pack="$(cd "$(dirname "$pack")" && pwd)/$(basename "$pack")"
fi
running=""
trap stopped TERM INT HUP
[ -n "$only" ] || rm -f "$out/parts.tsv"
export SWIN_GEMM_CONFIG="${SWIN_GEMM_CONFIG:-$out/gemm.json}"
failed=0 named_skip="${SWIN_GEMM_SKIP:-}"
case " $parts " in *" preflight "*) rm -f "$out/gemm_skip.txt" ;; *) skip_what_breaks ;; esac
[ -z "${SWIN_GEMM_SKIP:-}" ] || say "GEMM candidates left out: $SWIN_GEMM_SKIP"
"$python" benchmarks/gpu_report.py environment "$out" || exit 1
for name in $ALL_PARTS; do
  case " $parts " in *" $name "*) ;; *) continue ;; esac
  run_part "$name"
  if [ "$name" = build ] && [ "$failed" = 1 ]; then
    say "the engine was not built, so nothing else can run"
    break
  fi
done
say "summary: $out/summary.md ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
exit "$failed"
