#!/usr/bin/env bash
# Set up this checkout: .venv, packages, GL libraries, the explorer's page, LIBERO's config file and assets. Can be run
# twice.
#
#   bash scripts/setup.sh              # extras: eval
#   bash scripts/setup.sh eval,dev
#   source scripts/setup.sh eval       # and keep its functions and .venv on the PATH
#
# LIBERO_ASSETS=<archive or folder>  installs LIBERO's assets from there; without it hf-libero downloads them from
#                                    the Hub at first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-eval}"

say() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
# Print a command as it can be copied, then run it.
show() {
    local word line=+
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word="${word@Q}"
        line+=" $word"
    done
    echo "$line"
}
run() { show "$@"; "$@"; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' </dev/null >/dev/null 2>&1; }

find_python() {
    local candidate
    # python3 first: pyenv resolves it by .python-version.
    for candidate in python3 python3.12 python3.13 python; do
        # A pyenv shim exists for versions that are not selected here, too: only running it tells.
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

have_library() {
    local ldconfig
    ldconfig="$(command -v ldconfig || echo /sbin/ldconfig)"
    # Not grep -q: it would end ldconfig early, which pipefail takes for a failure.
    [ -x "$ldconfig" ] && "$ldconfig" -p | grep -F "$1" >/dev/null
}

have_package() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -F 'ok installed' >/dev/null; }

# Install Debian packages; who may not is told the command.
apt_install() {
    if [ "$(id -u)" -eq 0 ]; then
        run apt-get update -q </dev/null
        run env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" </dev/null
    else
        echo "Missing system packages. As root, run:"
        echo "    apt-get update && apt-get install -y $*"
    fi
}

say "System packages"
if [ "$(uname -s)" != Linux ]; then
    echo "Not Linux: nothing to do (rendering on macOS needs no packages)."
elif ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "No apt-get here. Needed: EGL and Mesa's software renderer (or a GPU driver with EGL), libGL, GLib,"
    echo "a C++ compiler and make."
else
    missing=()
    have_library libEGL.so.1 || missing+=(libegl1)
    have_package libgl1-mesa-dri || missing+=(libgl1-mesa-dri)
    # OpenCV, which robosuite imports, is linked against both.
    have_library libGL.so.1 || missing+=(libgl1)
    have_library libgthread-2.0.so.0 || missing+=(libglib2.0-0)
    # egl-probe, which robomimic needs, comes as source only.
    command -v c++ >/dev/null || missing+=(g++)
    command -v make >/dev/null || missing+=(make)
    # The explorer's tests drive it.
    if [[ ",$extras," == *,dev,* ]]; then
        command -v chromium >/dev/null || missing+=(chromium)
    fi
    if [ "${MUJOCO_GL:-}" = osmesa ]; then
        have_library libOSMesa.so || missing+=(libosmesa6)
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        apt_install "${missing[@]}"
    else
        echo "All there."
    fi
fi

say "Python environment in .venv"
if [ -x .venv/bin/python ] && is_new_enough .venv/bin/python; then
    echo "Reusing .venv ($(.venv/bin/python --version))."
else
    python="$(find_python)" ||
        fail "no Python 3.12 or newer found (tried python3, python3.12, python3.13, python); install Python 3.12"
    run "$python" -m venv --clear .venv
fi
# An environment made by uv has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || run .venv/bin/python -m ensurepip
# cmake from PyPI builds egl-probe where the system has none.
run .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv cmake

say "Packages: lerobot_policy_attn[$extras], at the versions in constraints.txt"
# egl-probe asks for CMake 2.8, which CMake 4 refuses unless told otherwise.
export CMAKE_POLICY_VERSION_MINIMUM="${CMAKE_POLICY_VERSION_MINIMUM:-3.5}"
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
run uv pip install -e ".[$extras]" -c constraints.txt </dev/null

say "The explorer's page"
if ! bash scripts/build_explorer.sh </dev/null; then
    [ "${CI:-}" != true ] || fail "CI=true, but the explorer's page could not be built"
    echo "warning: only \`lerobot-attn view\` lacks its page; scripts/build_explorer.sh builds it later"
fi

say "LIBERO's config file and assets"
if [ -n "${LIBERO_ASSETS:-}" ]; then
    run lerobot-attn setup-libero --assets "$LIBERO_ASSETS" </dev/null
else
    run lerobot-attn setup-libero </dev/null
fi
if python -c 'import sys; from lerobot_attn.machine.libero import assets_state; sys.exit(not assets_state().complete)' \
    </dev/null; then
    echo "The assets are complete."
else
    echo "The assets are not here and LIBERO_ASSETS is not set: hf-libero downloads them from the Hub at first use."
fi
