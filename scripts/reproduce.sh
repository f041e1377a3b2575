#!/usr/bin/env bash
# Reproduce both of the paper's tables on this machine: builds if needed, then runs the three measuring programs.
#
#   bash scripts/reproduce.sh [--out FOLDER]
#
#   --out FOLDER   where the tables and plots go (default results/local)
#   -h, --help     show this text
#
# 7 to 16 minutes on 2 cores (Zen 5, Zen 3). What was distilled, calibrated and converted is kept under
# results/local/work and used again while nothing it depends on changes; a killed run goes on where it stopped.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

out=results/local
while [ $# -gt 0 ]; do
  case "$1" in
    --out)
      [ $# -ge 2 ] || usage_error "$0" "--out needs a folder"
      out="$2"
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
cd "$SWIN_ROOT"

bash scripts/build_ft.sh
python="$(venv_dir)/bin/python"
"$python" pyharness/diff_baseline.py --out "$out"
"$python" pyharness/reproduce_table2.py --out "$out"
"$python" pyharness/latency_breakdown.py --out "$out"
say ""
say "Both tables took $((SECONDS / 60)) min $((SECONDS % 60)) s. Files: $out/table1.* $out/table2.* $out/diff_baseline.*"
