"""The megablocks adapter against the loop, forward and all gradients, on any machine.

Most tests replace the package by fakes. Where megablocks' Python package and triton are installed (no CUDA needed:
``pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1 triton``), the slow test uses the
package itself: only its compiled modules are fakes, and triton's kernels are interpreted.
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
from tests.models import fakes
from tests.models.test_experts import CASES, assert_bf16_is_close, assert_equals_the_loop, choices, run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_cache():
    adapter._module.cache_clear()
    yield
    adapter._module.cache_clear()


@pytest.fixture
def fake_megablocks(monkeypatch):
    fakes.put_megablocks(monkeypatch)


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("fake_megablocks")
def test_adapter_equals_the_loop_forward_and_backward(index):
    assert_equals_the_loop("megablocks", index)


@pytest.mark.usefixtures("fake_megablocks")
def test_bf16_is_close_to_fp32():
    assert_bf16_is_close("megablocks")


@pytest.mark.usefixtures("fake_megablocks")
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
def test_the_package_itself_equals_the_loop_and_matches_its_fake():
    missing = [name for name in ("megablocks", "stk", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (to install: see the docstring of {Path(__file__).name})")
    # In its own process: triton reads TRITON_INTERPRET when it is imported.
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
        fakes.put_megablocks_ops(patch)
    if importlib.util.find_spec("grouped_gemm") is None:
        fakes.put_grouped_gemm(patch)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP
    from triton.runtime.autotuner import Autotuner

    # Without a device nothing can be timed: use the first variant of each kernel.
    patch.setattr(Autotuner, "_bench", lambda *arguments, **settings: 0.0)

    real, fake = (inspect.signature(cls).parameters for cls in (Arguments, fakes.Arguments))
    for name, parameter in fake.items():
        if name not in ("activation_fn", "device"):
            assert real[name].default == parameter.default, name
    forwards = [inspect.signature(cls.forward) for cls in (ParallelDroplessMLP, fakes.ParallelDroplessMLP)]
    assert [*forwards[0].parameters] == [*forwards[1].parameters]

    for name, index in CASES.items():
        _assert_same(name, run("megablocks", torch.float32, index), run("loop", torch.float32, index))
        assert isinstance(adapter._module(32, 6, index.shape[1]), ParallelDroplessMLP)

    # megablocks' own gated MLP, with its three matrices cut from ours, gives the same output.
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
    reference = ParallelDroplessMLP(arguments).float()
    gate, up = gate_up.chunk(2, dim=1)
    with torch.no_grad():
        reference.mlp.w1.copy_(gate.flatten(0, 1))
        reference.mlp.v1.copy_(up.flatten(0, 1))
        reference.mlp.w2.copy_(down.transpose(1, 2).flatten(0, 1))
        expected = reference(x, weight, weight, index)
        _assert_same("its own MLP", [adapter.megablocks_experts(x, index, weight, gate_up, down)], [expected])
    for name, parameter in fakes.ParallelDroplessMLP(fakes.Arguments(**_shared(arguments))).named_parameters():
        assert reference.get_parameter(name).shape == parameter.shape, name
    print("all equal")


def _shared(arguments):
    return {name: getattr(arguments, name) for name in inspect.signature(fakes.Arguments).parameters}


def _assert_same(case, found, expected):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = float((one - other).abs().max())
        print(f"{case}, tensor {number}: largest difference {error:.1e}")
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    _compare_with_the_package()
