#!/bin/sh
# Prints the path of a Python (>= 3.12) that can build the environment, or says what to do and exits 1.
# Order: $PYTHON if given (then nothing else); python3.12, on the PATH and then among pyenv's versions;
# python3.13 likewise; python3. Each is run, since a pyenv shim of that name may be on the PATH and fail.
set -u

# Prints the real path of interpreter $1, or the reason why it will not do.
probe() {
    "$1" - 2>/dev/null <<'EOF' || echo "does not run"
import sys
if sys.version_info < (3, 12):
    print("is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
        print("ok:" + sys.executable)
    except ImportError:
        print("lacks the venv and ensurepip modules (Debian, Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2])
EOF
}

tried=""
try() {
    verdict=$(probe "$1")
    case $verdict in
        ok:*) echo "${verdict#ok:}"; exit 0 ;;
        *) tried="$tried
  $1: $verdict" ;;
    esac
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON"
    echo "error: PYTHON=$PYTHON cannot be used, Python 3.12 or newer is needed:$tried" >&2
    exit 1
fi

versions=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "${HOME:-}/.pyenv")}/versions
for minor in 3.12 3.13; do
    if command -v "python$minor" >/dev/null 2>&1; then try "python$minor"; fi
    # Newest patch release first; the names are plain version numbers, so sorting the last field is enough.
    for release in $(ls "$versions" 2>/dev/null | grep "^$minor\.[0-9]*\$" | sort -t. -k3,3nr); do
        try "$versions/$release/bin/python"
    done
done
if command -v python3 >/dev/null 2>&1; then try python3; fi

cat >&2 <<EOF
error: no Python 3.12 or 3.13 found (megatron-core needs 3.12 or newer). Tried:${tried:-" nothing: no python3 on the PATH"}
Install one, for example:
  apt install python3.12 python3.12-venv     (Debian, Ubuntu)
  pyenv install 3.12                         (pyenv; found without being made the default)
  conda create -n py312 python=3.12          (conda; then activate it)
or name one: make setup PYTHON=/path/to/python3.12
EOF
exit 1
