#!/usr/bin/env bash
# Set up, then run every check: ruff, mypy, the page's own, pytest. Runs them all, and fails at the end if one failed. A
# table says which lines of the package the test process did not run; what tests start as processes of their own does
# not count.
#
#   bash scripts/test.sh                  # everything
#   bash scripts/test.sh -k libero        # arguments go to pytest
#
# With CI=true or LIBERO_ASSETS set, the tests on the real LIBERO must run: they fail where they would otherwise skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${CI:-}" = true ] || [ -n "${LIBERO_ASSETS:-}" ]; then
    export LEROBOT_ATTN_REQUIRE_LIBERO=1
fi

# Dozens of processes that tests start import LeRobot: compiling it anew takes each of them 14 of 21 seconds.
unset PYTHONDONTWRITEBYTECODE

bash scripts/setup.sh eval,dev
export PATH="$PWD/.venv/bin:$PATH"

failed=()
check() {
    local name="$1"
    shift
    printf '\n==> %s\n+ %s\n' "$name" "$*"
    "$@" </dev/null || failed+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "page: types and format" bash scripts/build_explorer.sh lint
check "page: unit tests" bash scripts/build_explorer.sh test
check "pytest" pytest --cov --durations=15 "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\nAll checks passed.\n'
