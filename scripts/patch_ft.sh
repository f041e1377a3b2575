#!/usr/bin/env bash
# Works on the patch series that turns the FT graph into the GELU-less one (patches/README.md).
#   apply    apply the series to a fresh copy under build/patch-check and say what it changes
#   edit     open the patched graph in build/patch-edit as a git repository, one commit a patch
#   refresh  write the commits of build/patch-edit back to patches/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

graph=third_party/FasterTransformer
edit=build/patch-edit
say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

usage() {
  sed -n '2,5s/^# //p' "$0"
  exit "${1:-2}"
}

series() { grep -v -e '^#' -e '^[[:space:]]*$' patches/series || true; }

command -v git >/dev/null || fail "git is not installed; the series is applied with it"
command -v python3 >/dev/null || fail "python3 is not installed; scripts/apply_patches.py needs it"

apply() {
  rm -rf build/patch-check
  mkdir -p build/patch-check
  python3 scripts/apply_patches.py --source . --target build/patch-check
  say "applied $(series | wc -l) patches to build/patch-check:"
  git --no-pager diff --no-index --stat "$graph" "build/patch-check/$graph" || true
}

open_for_editing() {
  [ ! -e "$edit" ] || fail "$edit exists: finish with 'refresh', or remove the folder to start again"
  mkdir -p "$edit/third_party"
  cp -R "$graph" "$edit/third_party/"
  local git=(git -C "$edit")
  "${git[@]}" init --quiet --initial-branch=series
  "${git[@]}" config user.name "swin-int8 patch series"
  "${git[@]}" config user.email "series@swin-int8.invalid"
  "${git[@]}" config commit.gpgsign false
  "${git[@]}" add --all
  "${git[@]}" commit --quiet --message "FT baseline graph"
  "${git[@]}" tag baseline
  local patches=() name
  while read -r name; do patches+=("$PWD/patches/$name"); done < <(series)
  # All at once, so that `am --continue` goes on with those that follow.
  [ ${#patches[@]} -eq 0 ] || "${git[@]}" am --quiet --keep-cr "${patches[@]}" ||
    fail "a patch does not apply (named above). Resolve it in $edit, then git add and git am --continue there, which goes on with the rest"
  say "the patched graph is in $edit, one commit a patch on the tag 'baseline'."
  say "Commit your changes there (git rebase -i baseline to change an earlier patch), then: bash scripts/patch_ft.sh refresh"
}

refresh() {
  [ -d "$edit/.git" ] || fail "there is no $edit: open the series with 'edit' first"
  [ ! -d "$edit/.git/rebase-apply" ] && [ ! -d "$edit/.git/rebase-merge" ] ||
    fail "$edit is amid a patch that did not apply, or a rebase: finish it there (git am --continue, git rebase --continue)"
  [ -z "$(git -C "$edit" status --porcelain)" ] || fail "$edit has changes that are not committed: commit them, one idea a commit"
  local kept
  kept=$(mktemp -d)
  git -C "$edit" format-patch --quiet --zero-commit --no-signature --no-renames --output-directory "$kept" baseline..series
  git -C "$edit" diff --quiet baseline -- . ':!third_party' || fail "the series changes files outside third_party/"
  local old
  while read -r old; do rm -f "patches/$old"; done < <(series)
  { grep '^#' patches/series || true; find "$kept" -name '*.patch' -printf '%f\n' | sort; } >patches/series.tmp
  cp "$kept"/*.patch patches/
  mv patches/series.tmp patches/series
  rm -rf "$kept" "$edit"
  say "wrote $(series | wc -l) patches to patches/; now: bash scripts/patch_ft.sh apply && bash scripts/test.sh"
}

case "${1:-}" in
  apply) apply ;;
  edit) open_for_editing ;;
  refresh) refresh ;;
  -h | --help) usage 0 ;;
  *) usage ;;
esac
