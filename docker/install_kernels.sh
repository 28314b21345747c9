#!/usr/bin/env bash
# Builds megablocks, and optionally flash-attn, for the installed torch and CUDA toolkit.
#
#   docker/install_kernels.sh [--flash-attn]
#
# TORCH_CUDA_ARCH_LIST  GPU architectures, e.g. "9.0" for H100 and H200, "8.0;9.0" to include A100;
#                       default: the GPU of this machine
# MAX_JOBS              parallel compilers; each may take 4 GB of memory (flash-attn: 8 GB)
# CUDA_HOME             the toolkit; default: as reported by nvcc
# PYTHON                the interpreter; default: python
#
# Requires nvcc of the CUDA version that torch was built with (12.x and 13.x), and a C++ compiler. megablocks and
# grouped-gemm take a few minutes, flash-attn about two core-hours per architecture. These packages are optional:
# without them torch's own kernels are used.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}

fail() {
    echo "error: $*" >&2
    exit 1
}

flash_attn=
for argument in "$@"; do
    case $argument in
        --flash-attn) flash_attn=1 ;;
        --help | -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        *) fail "$argument: unknown option: --flash-attn or --help" ;;
    esac
done

cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') || fail "torch is not installed: install it first"
[ -n "$cuda" ] || fail "this torch is built for CPU: install one built for CUDA first"
command -v nvcc > /dev/null || fail "nvcc is not on the path: install the CUDA $cuda toolkit, or use docker/Dockerfile.cuda"
toolkit=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
[ "${toolkit%%.*}" = "${cuda%%.*}" ] || fail "nvcc is CUDA $toolkit, torch is built for $cuda: install the toolkit of torch's version"
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') \
        || fail "no GPU here: set TORCH_CUDA_ARCH_LIST, e.g. to 9.0"
fi
export TORCH_CUDA_ARCH_LIST
# torch assumes that nvcc's parent folder is the toolkit, which is wrong if a wrapper of nvcc is on the path.
CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' || true)}
export CUDA_HOME
# A toolkit may lack the libraries' headers; torch's wheels include them.
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu${cuda%%.*}/include
[ -d "$headers" ] && export CPATH="$headers${CPATH:+:$CPATH}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install --quiet 'setuptools>=77' wheel packaging ninja
echo "kernels for CUDA $cuda (nvcc $toolkit), architectures $TORCH_CUDA_ARCH_LIST"
# Always built from source: a wheel in pip's cache may have been built for CPU or another GPU.
"$python" -m pip download --quiet --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
    --dest "$work" --requirement "$here/kernels.txt"
for archive in "$work"/*.tar.gz; do
    tar --extract --gzip --file "$archive" --directory "$work"
    rm "$archive"
done

if [ "${cuda%%.*}" -ge 13 ]; then
    # CUDA 13 removed the last argument of two scan functions that megablocks calls.
    source=$(echo "$work"/megablocks-*/csrc/cumsum.h)
    sed --in-place --regexp-extended --null-data 's/stream,\s+debug_synchronous\)\)/stream))/g' "$source"
    [ "$(grep --count 'debug_synchronous)' "$source")" = 0 ] && [ "$(grep --count '[[:space:]]stream));' "$source")" = 2 ] \
        || fail "megablocks' csrc/cumsum.h is not as expected: is its version that of $here/kernels.txt?"
fi

"$python" -m pip install --no-deps --no-build-isolation --no-cache-dir "$work"/*/
if [ -n "$flash_attn" ]; then
    FLASH_ATTENTION_FORCE_BUILD=TRUE "$python" -m pip install --no-deps --no-build-isolation --no-cache-dir \
        --no-binary flash-attn flash-attn==2.8.3 einops
fi

"$python" - << 'END'
import importlib.util

import torch  # before the compiled modules, which link against it

import grouped_gemm.ops
import megablocks_ops

print("built:", megablocks_ops.__file__)
print("built:", grouped_gemm.backend.backend.__file__)
if importlib.util.find_spec("flash_attn"):
    import flash_attn

    print("built: flash-attn", flash_attn.__version__)
if not torch.cuda.is_available():
    print("no GPU here: on a machine with one, run  pytest tests/gpu -m gpu -n 0")
END
