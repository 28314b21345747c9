#!/usr/bin/env bash
# Builds megablocks, and where asked for flash-attn, for the torch and the CUDA toolkit that are installed here.
#
#   docker/install_kernels.sh [--flash-attn]
#
# TORCH_CUDA_ARCH_LIST  the cards to build for, e.g. "9.0" for H100 and H200, "8.0;9.0" for A100 too;
#                       unset: the card of this machine
# MAX_JOBS              compilers that run at once; each may take 4 GB of memory (flash-attn: 8 GB)
# CUDA_HOME             the toolkit, where it is not the one that nvcc itself names
# PYTHON                the interpreter, default python
#
# Needs nvcc of the CUDA version that torch was built with (12.x and 13.x), and a C++ compiler. megablocks and
# grouped-gemm take a few minutes, flash-attn about two core-hours for one kind of card. Without these packages
# everything runs as well, on torch's own kernels.
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
[ "${toolkit%%.*}" = "${cuda%%.*}" ] || fail "nvcc is CUDA $toolkit, torch is built for $cuda: install the toolkit of torch's"
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') \
        || fail "no card here to build for: set TORCH_CUDA_ARCH_LIST, e.g. to 9.0"
fi
export TORCH_CUDA_ARCH_LIST
# torch takes the folder above nvcc's for the toolkit, which is wrong where a wrapper of nvcc lies on the path.
CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' || true)}
export CUDA_HOME
# A toolkit may come without the libraries' headers; torch's own wheels bring them.
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu${cuda%%.*}/include
[ -d "$headers" ] && export CPATH="$headers${CPATH:+:$CPATH}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip install --quiet 'setuptools>=77' wheel packaging ninja
echo "kernels for CUDA $cuda (nvcc $toolkit), cards $TORCH_CUDA_ARCH_LIST"
# Built here and now: a wheel of another machine, taken from pip's cache, may be built for CPU or another card.
"$python" -m pip download --quiet --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
    --dest "$work" --requirement "$here/kernels.txt"
for archive in "$work"/*.tar.gz; do
    tar --extract --gzip --file "$archive" --directory "$work"
    rm "$archive"
done

if [ "${cuda%%.*}" -ge 13 ]; then
    # CUDA 13 removed the last argument of two scans that megablocks calls.
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

import torch  # before the compiled modules, which link to it

import grouped_gemm.ops
import megablocks_ops

print("built:", megablocks_ops.__file__)
print("built:", grouped_gemm.backend.backend.__file__)
if importlib.util.find_spec("flash_attn"):
    import flash_attn

    print("built: flash-attn", flash_attn.__version__)
if not torch.cuda.is_available():
    print("no card here: on a machine with one, run  pytest tests/gpu -m gpu")
END
