#!/usr/bin/env bash
# torch 2.11.0: torch.compile gives a zero gradient, without a word, through a custom autograd function that returns a
# tensor which its forward modified in place.
#
# Seen with torch 2.11.0 on CPU, Python 3.11: forward values are right; both gradients are exactly 0 with the backends
# "eager", "aot_eager" and "inductor", so the loss is in tracing, not in code generation. Without torch.compile they are
# right, and with torch 2.13.0 they are right in all cases. Returning a view of the tensor avoids it on 2.11.0.
# This script fails when that changes. It downloads torch's default build, several GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy
cat > "$folder/case.py" <<'PYTHON'
import torch


class Scale(torch.autograd.Function):
    """y = 2 x w; the multiplication by w is in place, on a tensor of the function's own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * 2).mul_(w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 2 * w, (grad * 2 * x).sum(0)


def results(function):
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    loss = function(x, w).square().sum()
    loss.backward()
    return loss.detach(), x.grad, w.grad


def scale(x, w):
    return Scale.apply(x, w)


print("torch", torch.__version__)
loss, *plain = results(scale)
torch.compiler.reset()
compiled_loss, *compiled = results(torch.compile(scale, backend="eager"))
print("loss, plain and compiled:", float(loss), float(compiled_loss))
print("largest gradients, plain:", [float(grad.abs().max()) for grad in plain])
print("largest gradients, compiled:", [float(grad.abs().max()) for grad in compiled])
torch.testing.assert_close(compiled_loss, loss)
assert all(grad.abs().max() > 1 for grad in plain)
assert all(bool((grad == 0).all()) for grad in compiled), "the gradients are not zero any more: torch has changed"
print("as seen: compiled gradients are zero")
PYTHON
"$folder/venv/bin/python" "$folder/case.py"
