#!/usr/bin/env bash
# Sends the committed code to the bucket as $BUCKET/pods/$NAME/code.tar.gz, with the worker's script next to it.
#
#   sync.sh [--allow-dirty] [--dry-run] [--env=FILE]
#
# Uncommitted changes are refused, so that a run can be traced to a commit; --allow-dirty sends them along (tracked files only).
# The workers take the new code at setup.sh.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "--allow-dirty" "$@"
settings

repo=$(git -C "$here" rev-parse --show-toplevel 2>/dev/null) || bad "$here is not inside a git checkout; the code that is sent is a commit"
git -C "$repo" cat-file -e "HEAD:$CONFIG" 2>/dev/null || bad "$env_file: CONFIG=${CONFIG@Q} is not a committed file of $repo; commit it"
commit=HEAD
if [[ -n $(git -C "$repo" status --porcelain --untracked-files=no) ]]; then
  [[ -n ${on[--allow-dirty]:-} ]] || bad "$repo has uncommitted changes; commit them, or send them along with --allow-dirty"
  # A commit of the changes that touches neither branch nor files.
  if [[ -n ${on[--dry-run]:-} ]]; then
    run git -C "$repo" stash create
    commit=COMMIT_OF_THE_LINE_ABOVE
  else
    commit=$(git -C "$repo" stash create)
  fi
fi
run git -C "$repo" archive --format=tar.gz --output="$tmp/code.tar.gz" "$commit"
run gcloud storage cp "$tmp/code.tar.gz" "$POD/code.tar.gz"
upload_worker
say "code of commit $(git -C "$repo" rev-parse --short HEAD)${on[--allow-dirty]:+ and uncommitted changes}: $POD/code.tar.gz"
