#!/usr/bin/env bash
# Makes or reuses .venv with everything training, evaluation and the tests need. quickstart.sh and test.sh call it.
#   bash setup.sh                 a GPU environment where nvidia-smi finds a GPU, else a CPU one
#   DEVICE=cpu bash setup.sh      (or gpu) decides it; PYTHON=python3.12 picks the interpreter
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
[ -f "requirements-$DEVICE.txt" ] || fail "DEVICE=$DEVICE: expected cpu or gpu"
WANTED="$DEVICE $(cat requirements.txt "requirements-$DEVICE.txt" overrides*.txt locks/*.txt pyproject.toml | sha256sum | cut -d' ' -f1)"
if [ "$(cat .venv/.installed 2>/dev/null)" = "$WANTED" ]; then
    echo "setup: .venv is up to date ($DEVICE)"
    exit 0
fi

command -v "$PYTHON" >/dev/null || fail "no $PYTHON on PATH: install Python 3.11 or 3.12, or name one with PYTHON="
VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case "$VERSION" in 3.11 | 3.12) ;; *) fail "$PYTHON is Python $VERSION: Python 3.11 or 3.12 is needed; name one with PYTHON=" ;; esac
LOCK=locks/$DEVICE-$VERSION.txt
if [ "$DEVICE" = cpu ] && ! command -v g++ >/dev/null; then
    fail "no g++ on PATH: PyTorch and Triton compile kernels on a CPU; install your system's C++ compiler"
fi

echo "setup: installing the $DEVICE environment into .venv (2 to 4 GB, a few minutes the first time)"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || fail "$PYTHON cannot make a virtual environment: install its venv module"
.venv/bin/python -m pip install --quiet uv || fail "pip could not install uv: is a package registry reachable?"
INSTALL=(.venv/bin/uv pip install --quiet --python .venv/bin/python)
if [ "$DEVICE" = cpu ]; then
    # PyTorch's CPU build: from wherever pip is configured to look, else from PyTorch's own index, which uv knows.
    TORCH=$(grep '^torch==' requirements-cpu.txt)
    .venv/bin/python -m pip install --quiet --no-deps "$TORCH" 2>/dev/null || "${INSTALL[@]}" --no-deps --torch-backend cpu "$TORCH" \
        || fail "$TORCH could not be installed: is a package registry reachable?"
fi
# Exactly the files whose hashes are in the lock file, which locks/make.sh writes.
"${INSTALL[@]}" --no-deps --require-hashes -r "$LOCK" || fail "the packages of $LOCK could not be installed (see above)"
# Editable, so that every vLLM worker finds this repository's loader through its entry point.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable . || fail "this repository could not be installed into .venv"
echo "$WANTED" > .venv/.installed
echo "setup: done"
