#!/bin/sh
# The wheel's server, where NVIDIA's images have theirs. It finds the libraries that came with it, and our backends.
packages=$(echo /opt/venv/lib/python3.*/site-packages)
export LD_LIBRARY_PATH="$packages/nvidia_pytriton.libs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$packages/pytriton/tritonserver/bin/tritonserver" --backend-directory=/opt/tritonserver/backends \
  --pinned-memory-pool-byte-size=0 "$@"
