"""Compiled layers: one graph without a break on the code path of CUDA, and the results of eager layers anywhere."""

import operator
import subprocess
import sys

import pytest
import torch

from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.model_input import PackedTokens
from moetrain.models.attention import make_layout
from moetrain.models.backends import Backends
from moetrain.models.compilation import uncompiled
from moetrain.models.router import RecordingMasks
from moetrain.models.transformer import LayerContext
from tests.models.test_transformer import assert_close, gradients, make_model

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("experts", [{}, {"experts": "dense", "dense_experts": 8}], ids=["routed", "dense"])
def test_a_layer_on_a_device_is_one_graph_for_any_number_of_samples(experts):
    """Traced on the meta device, which takes the same code path as CUDA."""
    model = make_model(dtype=torch.bfloat16, num_shared_experts=1, num_key_value_heads=2, **experts).to(META)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    layer, length = model.model.layers[0], 128
    model.compile_layers(fullgraph=True, backend=keep)
    for samples in (3, 5, 9, 40):
        cuts = torch.linspace(0, length, samples + 1).long()
        layout = make_layout(torch.stack([cuts[:-1], cuts.diff()], 1), "varlen", META, longest=length)
        tokens = torch.zeros(1, length, dtype=torch.int64, device=META)
        x = torch.zeros(length, 32, device=META, requires_grad=True)
        inputs = PackedTokens(tokens, None, tokens, tokens, tokens, layout.spans_N2, slots_per_row=8)
        context = LayerContext(
            torch.bfloat16,
            *model._rotary(tokens.flatten()),
            layout,
            RecordingMasks.make(inputs),
            Backends("varlen", "grouped_mm"),
        )
        out, routing = layer(x, context)
        (out.sum() + routing.z.sum() + routing.probs_E.sum()).backward()
        assert routing.sums_BRE.shape == (1, 16, 8)
    # One for the first number of samples, one for all others.
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_equal_eager_ones(make_settings, recompute):
    settings = make_settings()
    stream = training_stream(prepare_corpus(settings), settings)
    eager, compiled = make_model(recompute=recompute), make_model(recompute=recompute)
    compiled.compile_layers()
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for step in range(3):
        batch = stream.batch(step, 0, 4)
        assert_close(gradients(compiled, batch), gradients(eager, batch))


def test_uncompiled_functions_are_called_between_graphs_and_never_traced():
    traced, calls = [], []

    @uncompiled
    def double(x):
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    def keep(graph, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda x: double(x.sin()).cos(), backend=keep)
    for size in (3, 5, 9):
        x = torch.ones(size)
        torch.testing.assert_close(compiled(x), (2 * x.sin()).cos())
    assert calls == 3 * [False]
    assert operator.mul not in traced
    assert len(traced) <= 4  # sin and cos: for the first size and for any other


def test_the_compiler_is_not_loaded_before_something_is_compiled():
    code = "import sys, moetrain.models.transformer; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
