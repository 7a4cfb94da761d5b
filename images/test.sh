#!/usr/bin/env bash
# Builds the data image for real and runs the library and a component in it: tests/test_data_image.py.
# Root on Debian; installs podman and mmdebstrap where they are missing. Pulls nothing: the base is made here.
set -euo pipefail
cd "$(dirname "$0")/.."
base=localhost/trackrec-base:bookworm
image=localhost/trackrec/data:test
cache=$PWD/.cache/images
mkdir -p "$cache"
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

if ! podman image exists "$base"; then
  mmdebstrap --quiet --variant=apt --include=python3,python3-venv,ca-certificates bookworm "$scratch/base.tar"
  podman import --quiet "$scratch/base.tar" "$base"
fi
# The build has no network: it installs from wheels fetched out here, for the same Python.
.venv/bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 \
  --dest "$cache/wheels" --requirement requirements/data.txt
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$scratch/pip.conf"
buildah bud --quiet --network none --build-arg BASE_IMAGE="$base" \
  --volume "$cache/wheels:/wheels:ro" --volume "$scratch/pip.conf:/etc/pip.conf:ro" \
  --tag "$image" --file images/data/Dockerfile .
TRACKREC_DATA_IMAGE=$image .venv/bin/python -m pytest tests/test_data_image.py
