#!/usr/bin/env bash
# Sets up .venv if needed and runs the tests. Arguments go to pytest: `bash test.sh tests/test_multipack.py -k pack`.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/shellcheck --severity warning ./*.sh .ci/run
# Two workers of one thread: the tests start several processes, which would otherwise fight over the cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest -n 2 --dist worksteal --instafail --durations 15 "$@"
