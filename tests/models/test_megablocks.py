"""The megablocks adapter against the loop, forward and all gradients, on any machine.

Plain tests drive it through stand-ins of the package. Where megablocks' Python package and triton are installed (no
CUDA needed: ``pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1 triton``), the slow
test drives it through the package itself, with only the compiled modules stood in and triton's kernels interpreted.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain.models import experts_megablocks as adapter
from tests.models import stand_ins
from tests.models.test_experts import CASES, choices, run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _forget_modules():
    adapter._module.cache_clear()
    yield
    adapter._module.cache_clear()


@pytest.fixture
def stood_in(monkeypatch):
    stand_ins.put_megablocks(monkeypatch)


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("stood_in")
def test_adapter_equals_the_loop_forward_and_backward(index):
    for mine, reference in zip(run("megablocks", torch.float32, index), run("loop", torch.float32, index), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stood_in")
def test_bf16_is_close_to_fp32():
    for mine, exact in zip(
        run("megablocks", torch.bfloat16, CASES["even"]), run("loop", torch.float32, CASES["even"]), strict=True
    ):
        scale = exact.abs().max()
        torch.testing.assert_close(mine.float() / scale, exact / scale, rtol=0, atol=0.02)


@pytest.mark.usefixtures("stood_in")
def test_megablocks_own_module_holds_no_weights():
    run("megablocks", torch.float32, CASES["even"])
    module = adapter._module(32, 6, 2)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_without_the_package_the_import_says_so():
    if importlib.util.find_spec("megablocks"):
        pytest.skip("megablocks is installed")
    with pytest.raises(ModuleNotFoundError, match="megablocks"):
        run("megablocks", torch.float32, CASES["even"])


@pytest.mark.slow
def test_the_package_itself_equals_the_loop_and_its_stand_in():
    missing = [name for name in ("megablocks", "stk", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (how: see the head of {Path(__file__).name})")
    # In a process of its own: triton decides when it is imported whether kernels are interpreted.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.test_megablocks"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"


def _compare_with_the_package() -> None:
    patch = pytest.MonkeyPatch()
    if importlib.util.find_spec("megablocks_ops") is None:
        stand_ins.put_megablocks_ops(patch)
    if importlib.util.find_spec("grouped_gemm") is None:
        stand_ins.put_grouped_gemm(patch)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP
    from triton.runtime.autotuner import Autotuner

    # Without a device there is nothing to time: the first of each kernel's variants is taken.
    patch.setattr(Autotuner, "_bench", lambda *arguments, **settings: 0.0)

    defaults, mine = (inspect.signature(kind).parameters for kind in (Arguments, stand_ins.Arguments))
    for name, parameter in mine.items():
        if name not in ("activation_fn", "device"):
            assert defaults[name].default == parameter.default, name
    forwards = [inspect.signature(kind.forward) for kind in (ParallelDroplessMLP, stand_ins.ParallelDroplessMLP)]
    assert [*forwards[0].parameters] == [*forwards[1].parameters]

    for name, index in CASES.items():
        through, reference = run("megablocks", torch.float32, index), run("loop", torch.float32, index)
        _same(name, through, reference)
        assert isinstance(adapter._module(32, 6, index.shape[1]), ParallelDroplessMLP)

    # megablocks' own gated MLP, with its three matrices cut from ours, gives what ours gives.
    arguments = Arguments(
        hidden_size=32,
        ffn_hidden_size=32,
        moe_num_experts=6,
        moe_top_k=2,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=torch.nn.functional.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device="cpu",
        moe_loss_weight=0.0,
    )
    index = choices(50, 2)
    torch.manual_seed(0)
    x, weight = torch.randn(50, 32), torch.rand(50, 2)
    gate_up, down = torch.randn(6, 2 * 32, 32) / 6, torch.randn(6, 32, 32) / 4
    theirs = ParallelDroplessMLP(arguments).float()
    gate, up = gate_up.chunk(2, dim=1)
    with torch.no_grad():
        theirs.mlp.w1.copy_(gate.flatten(0, 1))
        theirs.mlp.v1.copy_(up.flatten(0, 1))
        theirs.mlp.w2.copy_(down.transpose(1, 2).flatten(0, 1))
        expected = theirs(x, weight, weight, index)
        _same("its own MLP", [adapter.megablocks_experts(x, index, weight, gate_up, down)], [expected])
    for name, parameter in stand_ins.ParallelDroplessMLP(stand_ins.Arguments(**_shared(arguments))).named_parameters():
        assert theirs.get_parameter(name).shape == parameter.shape, name
    print("all equal")


def _shared(arguments):
    return {name: getattr(arguments, name) for name in inspect.signature(stand_ins.Arguments).parameters}


def _same(case, mine, reference):
    for number, (one, other) in enumerate(zip(mine, reference, strict=True)):
        error = float((one - other).abs().max())
        print(f"{case}, tensor {number}: largest difference {error:.1e}")
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    _compare_with_the_package()
