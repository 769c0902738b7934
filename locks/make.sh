#!/usr/bin/env bash
# Writes locks/<device>-<python>.txt: every package that setup.sh installs, pinned, with the hashes of its files.
# Run it after a change of requirements*.txt or overrides*.txt. For Linux on x86-64.
# PyTorch's CPU build is not in them: it comes from PyTorch's own index, or from where pip is configured to look.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-.venv/bin/uv}
COMPILE=("$UV" pip compile --quiet --no-header --no-annotate --generate-hashes --python-platform x86_64-manylinux_2_28)
DROP=$(mktemp) NEEDED=$(mktemp)
trap 'rm -f "$DROP" "$NEEDED"' EXIT
echo 'torch ; python_version < "3"' > "$DROP"
# what PyTorch's CPU build asks for
printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions > "$NEEDED"
grep -v -e '^-r' -e '^torch==' requirements-cpu.txt >> "$NEEDED"
for python in 3.11 3.12; do
    "${COMPILE[@]}" --python-version "$python" --overrides overrides.txt requirements-gpu.txt -o "locks/gpu-$python.txt"
    "${COMPILE[@]}" --python-version "$python" --overrides overrides.txt --overrides overrides-cpu.txt --overrides "$DROP" \
        requirements.txt "$NEEDED" -o "locks/cpu-$python.txt"
done
