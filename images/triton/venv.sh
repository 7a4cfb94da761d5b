#!/usr/bin/env bash
# Makes .venv-triton: the Triton server of `nvidia-pytriton`, and what its models run in on a CPU. For `make serve` and
# the tests; does nothing where it is up to date. Its numpy is older than .venv's: with 2.x outputs come out empty.
# The index must serve the CPU build of torch (elsewhere: set PIP_EXTRA_INDEX_URL to one that does).
set -euo pipefail
cd "$(dirname "$0")/../.."
locks=(requirements/triton-cpu.txt requirements/torch.txt)
venv=.venv-triton
if cmp --silent <(cat "${locks[@]}") "$venv/.requirements"; then
  exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
for lock in "${locks[@]}"; do
  "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$lock"
done
"$venv/bin/python" -m pip install --quiet --no-deps --editable .
"$venv/bin/python" -c "import pytriton, transformers"
cat "${locks[@]}" >"$venv/.requirements"
