#!/usr/bin/env bash
# Fetch what a machine with CUDA, PyTorch and transformers, but without network, lacks for this project: about 12 MB in .wheels/.
#   jobs/gpu_wheels.sh [PYTHON_VERSION]      # of the GPU machine, default 3.12
# Not run on a GPU machine yet.
set -euo pipefail
cd "$(dirname "$0")/.."
python_version=${1:-3.12}
cuda=${CUDA:-130} # libraries of bitsandbytes to keep

fetch() { # FOLDER PACKAGE...
  local folder=$1
  shift
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
    --abi "cp${python_version/./}" --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --platform any --dest "$folder" "$@"
}

rm -rf .wheels
fetch .wheels trl==1.16.0 peft==0.21.2 datasets==5.2.0 dill multiprocess pydantic pydantic-core annotated-types typing-inspection liger-kernel==0.8.5
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
fetch "$whole" bitsandbytes==0.50.2
python3 - "$whole" .wheels "$cuda" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

source, target, cuda = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
for wheel in source.glob("bitsandbytes-*.whl"):
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(target / wheel.name, "w", zipfile.ZIP_DEFLATED) as slim:
        for item in whole.infolist():
            library = re.search(r"libbitsandbytes_(.+)\.(so|dll)$", item.filename)
            if library is None or library[1] in (f"cuda{cuda}", "cpu"):
                slim.writestr(item, whole.read(item.filename))
PYTHON
du -sh .wheels
