# Shell functions that the scripts of this folder share. Sourced, never run; needs bash >= 4.
# shellcheck shell=bash

# The repository root. The scripts work from there, whatever folder they are called from.
SWIN_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SWIN_LOGS="$SWIN_ROOT/build/logs"
SWIN_MIN_PYTHON="3.10"

# say TEXT: one line of progress.
say() { printf '%s\n' "$*"; }

# die TEXT: one line on stderr, status 1. TEXT says what is wrong, why it matters and what to do.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# usage_from FILE: prints the comment block at the head of FILE (after the #! line) as its help text.
usage_from() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"; }

# usage_error FILE TEXT: one line about a wrong option, status 2.
usage_error() {
  printf 'error: %s; see bash scripts/%s --help\n' "$2" "$(basename "$1")" >&2
  exit 2
}

# full_disk LOG: what to do about a full disk, where the log of a failed command tells of one; else nothing.
full_disk() {
  awk '/No space left on device|Disk quota exceeded/ { found = 1 } END { exit !found }' "$1" || return 0
  local place room=""
  for place in "$SWIN_ROOT" "${TMPDIR:-/tmp}"; do
    room="$room${room:+, }$(df -Ph "$place" 2>/dev/null | awk 'NR == 2 { print $4 }') in $place"
  done
  printf '%s' "The disk is full (free now: $room). Make room, or name another place for temporary files (TMPDIR); then run this script again."
}

# run_step WHAT TODO COMMAND...: runs COMMAND with its output in a log file; prints one line. When it fails, prints the
# end of the log, then what failed, where the whole log is, and TODO, or what to do about a full disk.
run_step() {
  local what="$1" todo="$2" log started=$SECONDS
  shift 2
  mkdir -p "$SWIN_LOGS"
  log="$SWIN_LOGS/$(printf '%s' "$what" | tr -c 'A-Za-z0-9\n' '_').log"
  printf '%s ... ' "$what"
  if "$@" >"$log" 2>&1 </dev/null; then
    say "done ($((SECONDS - started)) s)"
  else
    say "FAILED"
    tail -n 25 "$log" >&2
    local full
    full="$(full_disk "$log")"
    todo="${full:-$todo}"
    die "$what failed (whole log: ${log#"$SWIN_ROOT"/}). $todo"
  fi
}

# python_is_new_enough PYTHON
python_is_new_enough() {
  "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$SWIN_MIN_PYTHON'.split('.'))))" >/dev/null 2>&1
}

# find_python: prints a Python >= 3.10: $PYTHON if set, else the first on PATH that is new enough.
find_python() {
  local candidate found=""
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON is set to '$PYTHON', which is not a program. Unset it or name a Python >= $SWIN_MIN_PYTHON."
    python_is_new_enough "$PYTHON" || die "PYTHON is set to '$PYTHON', which does not run or is older than $SWIN_MIN_PYTHON. Name a Python >= $SWIN_MIN_PYTHON."
    command -v "$PYTHON"
    return
  fi
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if python_is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
    found="$found $candidate ($("$candidate" --version 2>&1 | head -n 1))"
  done
  die "no Python >= $SWIN_MIN_PYTHON on PATH (found:${found:- none}). It runs the harness and the build. Install it (Debian/Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python3."
}

# venv_dir: prints the virtual environment in use: the active one, else .venv of the repository.
venv_dir() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then printf '%s\n' "$VIRTUAL_ENV"; else printf '%s\n' "$SWIN_ROOT/.venv"; fi
}

# digest FILE... (and the text on stdin): one sha256 of all of it.
digest() { cat - "$@" | sha256sum | cut -d ' ' -f 1; }
