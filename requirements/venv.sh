#!/usr/bin/env bash
# Makes an environment beside .venv from its lock; does nothing where it is up to date.
#   bash requirements/venv.sh triton   .venv-triton: the Triton server of `nvidia-pytriton`, and what its models run in on a
#                                      CPU, for `make serve` and the tests. With numpy 2 its outputs come out empty.
#   bash requirements/venv.sh vllm     .venv-vllm: the vLLM engine's tests
# The index must serve the CPU build of torch (elsewhere: set PIP_EXTRA_INDEX_URL to one that does).
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  triton) modules="pytriton, transformers" ;;
  vllm) modules="vllm" ;;
  *) echo "usage: bash requirements/venv.sh triton|vllm" >&2; exit 2 ;;
esac
locks=("requirements/$1-cpu.txt" requirements/torch.txt)
venv=.venv-$1
if cmp --silent <(cat "${locks[@]}") "$venv/.requirements"; then
  exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# --no-deps: the locks are complete, and leave out what nothing here needs (requirements/lock.sh).
for lock in "${locks[@]}"; do
  "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$lock"
done
"$venv/bin/python" -m pip install --quiet --no-deps --editable .
"$venv/bin/python" -c "import $modules"
cat "${locks[@]}" >"$venv/.requirements"
