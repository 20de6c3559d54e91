#!/usr/bin/env bash
# Measure a training step on this machine's GPU, without network; packages from .wheels/ (jobs/gpu_wheels.sh), if it is there.
#   jobs/measure_gpu.sh OUT [--minutes 12 ...]      # as python -m benchmarks.gpu
# Not run on a GPU machine yet.
set -euo pipefail
cd "$(dirname "$0")/.."
if compgen -G ".wheels/*.whl" >/dev/null; then
  if [[ ! -d .site ]]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target .site.part .wheels/*.whl
    mv .site.part .site
  fi
  export PYTHONPATH="$PWD/.site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec python3 -m benchmarks.gpu "$@"
