#!/usr/bin/env bash
# Set up, then run every check: ruff, mypy, the page's own, pytest. Runs them all, and fails at the end if one failed. A
# table says which lines of the package the test processes did not run; what tests start as processes of their own does
# not count.
#
#   bash scripts/test.sh                  # everything
#   bash scripts/test.sh -k libero        # arguments go to pytest
#
# Tests run on all cores, four at most, those marked `alone` after that one by one. What failed is run once more, with
# nothing beside it; what passes then is listed and counts as passed.
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

# Where pytest notes what failed: not in the checkout's own cache, which may hold failures of another day.
cache="$(mktemp -d)"
trap 'rm -rf "$cache"' EXIT

# Run pytest; what fails is noted and may pass alone. Anything else that goes wrong is a failure here and now.
n_tested=0
tests() {
    local status=0
    printf '+ pytest %s\n' "$*"
    pytest -o cache_dir="$cache" --cov --cov-append --cov-report= --durations=15 "$@" </dev/null || status=$?
    [ "$status" -ne 5 ] || return 0 # no test of this kind was asked for
    n_tested=$((n_tested + 1))
    [ "$status" -le 1 ] || failed+=("pytest (exit status $status)")
}

failures() {
    python - "$cache/v/cache/lastfailed" <<'END'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
print("\n".join(sorted(json.loads(path.read_text()))) if path.exists() else "")
END
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "page: types and format" bash scripts/build_explorer.sh lint
check "page: unit tests" bash scripts/build_explorer.sh test

# A process for each core: more threads would only get into each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
coverage erase
printf '\n==> pytest: on all cores\n'
tests --alone=skip -n logical --maxprocesses 4 --max-worker-restart 3 --dist loadfile --no-loadscope-reorder "$@"
printf '\n==> pytest: alone\n'
tests --alone=only "$@"
[ "$n_tested" -gt 0 ] || failed+=("pytest: there is no such test")

first="$(failures)"
if [ -n "$first" ]; then
    printf '\n==> pytest: what failed, once more and alone\n'
    tests --last-failed --last-failed-no-failures=none --maxfail=20 "$@"
    again="$(failures)"
fi
printf '\n==> coverage\n'
coverage report || failed+=("coverage report")

if [ -n "$first" ]; then
    printf '\nTests that failed at first and passed alone:\n'
    LC_ALL=C comm -23 <(echo "$first") <(echo "$again") | sed 's/^/    /'
    if [ -n "$again" ]; then
        printf '\nTests that failed again, or were not run again after 20 failures:\n'
        sed 's/^/    /' <<<"$again"
        failed+=("pytest")
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\nAll checks passed.\n'
