"""The package as a whole: its exports, its imports, torch arrays, and the text of its README."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moetrain import grokking as g

from . import references as ref

FOLDER = Path(g.__file__).parent


def test_everything_exported_exists_and_is_described():
    for name in g.__all__:
        assert getattr(g, name).__doc__, name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_imports_nothing_else_of_the_project(path):
    allowed = set(sys.stdlib_module_names) | {"numpy", "scipy", "rapidfuzz"}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), ast.unparse(node)


STEMS = [
    "d_path",
    "d_path_norm",
    "d_path_by_layer",
    "sharing",
    "individuality",
    "spread",
    "layer_cka",
    "cosine",
    "consistency",
    "inconsistency",
    "d_eff",
    "d_eff_linear",
    "effective_rank",
    "left_out",
    "gap",
    "gap_heldout",
    "fraction",
    "delay",
    "correlation",
    "phase",
    "load_cv",
    "entropy",
    "dead",
]


@pytest.mark.parametrize("stem", STEMS)
def test_every_quantity_has_a_description_with_its_sign_and_limits(stem):
    text = g.describe(stem)
    assert text.count("**Sign:**") == text.count("**Reading it:**") == text.count("**It does not mean**") == 1
    assert "## " not in text


@pytest.mark.parametrize(
    ("tag", "stem"),
    [
        ("pathway/d_path_norm/math", "d_path_norm"),
        ("pathway_heldout/cosine/code", "cosine"),
        ("stream/inconsistency/web", "inconsistency"),
        ("kernel/d_eff_linear/math", "d_eff_linear"),
        ("memorized/gap_heldout/math", "gap_heldout"),
        ("delay/math", "delay"),
        ("correlation/d_path/math", "correlation"),
        ("phase/math", "phase"),
        ("experts/load_cv/worst", "load_cv"),
        ("pathway/spread/cosine", "spread"),  # a domain may have any name
    ],
)
def test_a_tag_has_the_description_of_its_quantity(tag, stem):
    assert g.describe(tag) == g.describe(stem)


def test_an_unknown_quantity_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"no description of 'loss/train'.*d_path_norm"):
        g.describe("loss/train")


PRINT_BITS = """
import numpy as np
from moetrain import grokking as g
weights = np.random.default_rng(0).dirichlet(np.ones(64), size=(300, 8))
rows = np.random.default_rng(1).normal(size=(8, 64, 128))
halves = weights[:150], weights[150:]
print(g.d_path(weights), g.d_path(weights, normalized=True), g.d_path(weights, normalized=True, max_pairs=999))
print(g.sharing(*halves), g.individuality(*halves), g.memorized_gap(weights[:, 0, 0], weights[:, 0, 1]))
blocks = g.gram_blocks(rows)
print(g.cosine(weights, blocks).tolist(), g.group_consistency(weights, blocks))
print(g.d_eff(weights), g.spread(weights))
"""


def test_bits_do_not_depend_on_the_number_of_threads():
    def run(threads):
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        command = [sys.executable, "-c", PRINT_BITS]
        return subprocess.run(command, env={**os.environ, **count}, capture_output=True, text=True, check=True).stdout

    one = run(1)
    assert one.count("Estimate(") == 7
    assert run(3) == one


def test_torch_tensors_give_what_numpy_arrays_give():
    torch = pytest.importorskip("torch")
    weights = ref.random_weights(66, 3, 6).astype(np.float32)
    rows = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    tensor, router = torch.tensor(weights, requires_grad=True), torch.nn.Parameter(torch.tensor(rows))
    assert g.d_path(tensor) == g.d_path(weights)
    assert g.sharing(tensor[:30], tensor[30:]) == g.sharing(weights[:30], weights[30:])
    np.testing.assert_array_equal(g.inconsistency(tensor, router), g.inconsistency(weights, rows))
    blocks = tuple(torch.tensor(block) for block in g.gram_blocks(router))
    np.testing.assert_array_equal(g.cosine(tensor, blocks), g.cosine(weights, rows))
    assert g.d_eff(tensor) == g.d_eff(weights)
    assert g.layer_cka(tensor) == g.layer_cka(weights)
    assert g.memorized_at(torch.tensor([3.0, 0.5, 0.5]), eps=1) == 1
    assert g.generalized_at(torch.tensor([False, True, True])) == 1
    half = tensor.detach().bfloat16()
    assert g.d_path(half) == g.d_path(half.float().numpy())
