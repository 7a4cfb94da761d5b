#!/usr/bin/env bash
# Makes the base and every overlay with kubectl's kustomize, then checks what comes out: tests/test_manifests.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! which kubectl >/dev/null && which apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  apt-get install -qq --yes --no-install-recommends kubernetes-client >/dev/null || true
fi
# Kustomize's components came with kubectl 1.21; Debian's package has them from release 13 on. What it can do is asked,
# not its version, which each distributor writes in another way.
if ! kubectl kustomize manifests/overlays/local >/dev/null; then
  echo "needs kubectl 1.21 or newer on the PATH; get it from https://kubernetes.io/docs/tasks/tools/#kubectl" >&2
  exit 1
fi
exec "${PYTHON:-.venv/bin/python}" -m pytest tests/test_manifests.py
