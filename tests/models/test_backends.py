"""The choice of backends: named ones, `auto`, and the reasons for rejections."""

import itertools

import pytest
import torch

from moetrain.config import ModelSettings, SettingsError
from moetrain.models import backends
from moetrain.models import experts_megablocks as megablocks
from moetrain.models.backends import (
    UnusableError,
    check_backend,
    choose,
    choose_backends,
    compare_attention,
    compare_experts,
)
from tests.models import fakes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = ModelSettings(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    intermediate_size=32,
)
PRECISIONS = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _packages(monkeypatch):
    megablocks._module.cache_clear()
    fakes.put_megablocks(monkeypatch)
    fakes.put_flash_attn(monkeypatch)
    fakes.put_varlen(monkeypatch)
    yield
    megablocks._module.cache_clear()


def test_auto_on_cpu_takes_the_fastest_without_a_check(monkeypatch):
    monkeypatch.setattr(backends, "compare_experts", None)
    monkeypatch.setattr(backends, "compare_attention", None)
    chosen = choose_backends(ModelSettings(), CPU, torch.bfloat16)
    assert (chosen.attention, chosen.experts) == ("batched", "grouped_mm")
    assert chosen.notes == ("attention: batched", "experts: grouped_mm")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_grouped_mm_is_rejected_exactly_where_torch_refuses_the_widths(dtype):
    for width, inner in itertools.product((8, 10, 12, 16, 36), (6, 8, 12, 18, 100)):
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 1}
        settings = ModelSettings(**sizes, num_experts=3, num_experts_per_tok=2)
        if choose_backends(settings, CPU, dtype).experts == "grouped_mm":
            compare_experts("grouped_mm", settings, CPU, dtype)
        else:
            with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
                compare_experts("grouped_mm", settings, CPU, dtype)


def test_widths_that_grouped_mm_cannot_take_are_named_and_the_remedies_help():
    narrow = {"hidden_size": 64, "intermediate_size": 18, "num_attention_heads": 4}
    with pytest.raises(SettingsError) as caught:
        choose_backends(ModelSettings(**narrow, experts="grouped_mm"), CPU, torch.bfloat16)
    needed = "model.intermediate_size=18 is no multiple of 8, as it needs"
    assert str(caught.value) == (f"model.experts=grouped_mm: {needed}: set model.experts=auto, which takes what works")
    chosen = choose_backends(ModelSettings(**narrow, experts="auto"), CPU, torch.bfloat16)
    assert chosen.notes[1] == f"experts: loop; grouped_mm not taken: {needed}"
    wider = ModelSettings(**narrow | {"intermediate_size": 24}, experts="grouped_mm")
    assert choose_backends(wider, CPU, torch.bfloat16).experts == "grouped_mm"


@pytest.mark.parametrize("section", ["experts: megablocks", "attention: flash_attn", "attention: varlen"])
def test_a_cuda_backend_named_on_cpu_is_one_error_with_a_remedy(section):
    what, name = section.split(": ")
    with pytest.raises(SettingsError, match=rf"model\.{what}={name}: it needs a CUDA device: set model\.{what}=auto"):
        choose_backends(ModelSettings(**{what: name}), CPU, torch.bfloat16)


@pytest.mark.parametrize("name", ["megablocks", "flash_attn", "varlen"])
def test_kernels_are_rejected_in_fp32(name):
    with pytest.raises(UnusableError, match=r"computes in bf16, and train\.precision gives fp32"):
        check_backend(name, SETTINGS, CUDA, torch.float32)


def test_auto_takes_the_first_that_passes_and_notes_why_others_were_rejected():
    def check(name):
        if name == "first":
            raise ModuleNotFoundError("No module named 'first.kernels'", name="first.kernels")
        if name == "second":
            raise RuntimeError("no kernel image\nis available")

    name, note = choose("experts", "auto", ("first", "second", "third", "fourth"), check)
    assert name == "third"
    assert note == (
        "experts: third; first not taken: first.kernels is not installed; "
        "second not taken: RuntimeError: no kernel image is available"
    )
    assert choose("experts", "fourth", (), check) == ("fourth", "experts: fourth, as set")
    with pytest.raises(SettingsError, match=r"model\.experts=first: first\.kernels is not installed: set"):
        choose("experts", "first", (), check)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ["megablocks", "grouped_mm", "loop"])
def test_correct_experts_pass(name, dtype):
    compare_experts(name, SETTINGS, CPU, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ["flash_attn", "varlen", "sdpa", "batched"])
def test_correct_attention_passes(name, dtype):
    compare_attention(name, SETTINGS, CPU, dtype)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_even_in_inference(mode):
    with mode():
        compare_experts("megablocks", SETTINGS, CPU, torch.bfloat16)
        compare_attention("varlen", SETTINGS, CPU, torch.bfloat16)


def test_experts_with_a_wrong_gradient_are_rejected(monkeypatch):
    def wrong(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
        out = right_gmm(a, b, batch_sizes, trans_a, trans_b, c)
        if trans_a:  # the gradient of an expert without tokens is uninitialized memory
            out[batch_sizes == 0] = torch.nan
        return out

    right_gmm = fakes.gmm
    monkeypatch.setattr(fakes, "gmm", wrong)
    with pytest.raises(UnusableError, match="its gradient of gate_up_proj is off by nan"):
        compare_experts("megablocks", SETTINGS, CPU, torch.bfloat16)


def test_attention_to_later_tokens_is_rejected(monkeypatch):
    kernel = fakes.flash_attn_varlen_func
    fakes.put(monkeypatch, flash_attn={"flash_attn_varlen_func": lambda *a, causal, **k: kernel(*a, causal=False, **k)})
    with pytest.raises(UnusableError, match="its output is off by"):
        compare_attention("flash_attn", SETTINGS, CPU, torch.bfloat16)
