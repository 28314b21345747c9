"""Memory of a training step: predicted from the model without running it, and measured on a running one.

The prediction runs the model's forward pass on the meta device and adds up what autograd saves for backward, so it
follows changes of the model. With `train.compile` that is what torch.compile chooses to save. Without it, attention,
norms and megablocks are replaced by functions that save what their CUDA kernels save. Gradients, optimizer state and
temporary buffers are calculated.

Shapes: N tokens of a micro-batch, D hidden size, V vocabulary, E experts, K experts per token, F width of an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from moetrain.config import ModelSettings, Settings
from moetrain.model_input import PackedTokens
from moetrain.models import attention, elementwise, experts, loss, transformer
from moetrain.models.backends import Backends
from moetrain.models.compilation import uncompiled
from moetrain.models.transformer import Experts, Transformer
from moetrain.optim.builder import make_optimizer

_FLOAT32 = 4
_LOGIT_BYTES = 10  # per logit of a chunk of the loss: bf16, float32, and softmax


@dataclass(frozen=True)
class Kept:
    """Bytes saved for backward, without parameters: per layer, and outside of the layers."""

    layer: int
    rest: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``peak`` is the maximum over a step."""

    parameters: int
    optimizer: int
    gradients: int
    kept: int  # saved for backward
    passing: int  # temporary buffers of a layer, or of a chunk of the loss
    micro_batches: int

    @property
    def peak(self) -> int:
        # Gradients grow while saved tensors are freed; from the second micro-batch on they exist from the start.
        both = self.kept + self.gradients if self.micro_batches > 1 else max(self.kept, self.gradients)
        return self.parameters + self.optimizer + both + self.passing


def predict(
    settings: Settings,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    devices: int = 1,
    shards: int | None = None,
    logits_held: int | None = None,
) -> Memory:
    """Memory of a training step on each device, with experts split as ``train.expert_parallel`` says.

    Args:
        devices: number of devices that the rows are split over.
        shards: number of devices that parameters, gradients and optimizer state are split over by `fully_shard`, which
            may be 1; None: it is not used.
        logits_held: number of logits that the loss computes at once; None uses the loss's number on CUDA.

    Raises:
        ValueError: the rows do not divide over the devices.
    """
    rows, uneven = divmod(settings.train.batch_rows, devices)
    micro = settings.train.micro_batch_rows or rows
    if uneven or rows % micro:
        raise ValueError(f"train.batch_rows {settings.train.batch_rows} does not divide over {devices} devices")
    kept = count_kept(settings, vocab_size, micro, dtype)
    model, tokens = settings.model, micro * settings.data.seq_len
    layers = model.num_hidden_layers
    parameters, layer = count_parameters(settings, vocab_size)
    sharded, shards = shards is not None, shards or 1
    elsewhere = routed_parameters(settings) // layers
    elsewhere -= elsewhere // settings.train.expert_parallel
    layer -= elsewhere
    present = parameters - layers * elsewhere  # where they are not sharded
    held = logits_held or loss._CHUNK_LOGITS
    in_the_loss = min(held, tokens * vocab_size) * _LOGIT_BYTES
    # Backward of a layer: gradients of its experts' rows, and of its weights in the dtype of computation.
    routed = tokens * model.num_experts_per_tok
    in_a_layer = routed * (model.hidden_size + 4 * model.intermediate_size) * dtype.itemsize + layer * dtype.itemsize
    if settings.train.expert_parallel > 1:  # experts keep the rows they are sent, not tokens; assumed to be balanced
        received = (routed - tokens) * model.hidden_size * dtype.itemsize
        kept = Kept(kept.layer + received, kept.rest)
    if settings.train.activation_checkpointing:
        inputs = layers * tokens * model.hidden_size * _FLOAT32
        moments = [(inputs + kept.rest, in_the_loss), (inputs + kept.layer, in_a_layer)]
    else:
        kept_bytes = layers * kept.layer + kept.rest
        moments = [(kept_bytes, in_the_loss), (kept_bytes, in_a_layer)]
    kept_bytes, passing = max(moments, key=sum)
    gathered = layer * _FLOAT32 if sharded else 0
    return Memory(
        parameters=(parameters // shards if sharded else present) * _FLOAT32,
        optimizer=optimizer_bytes(settings, vocab_size, 1 if sharded else settings.train.expert_parallel) // shards,
        # Reduced once per step: until then each device holds those of its micro-batches unsharded.
        gradients=(parameters // shards if sharded and rows == micro else present) * _FLOAT32,
        kept=kept_bytes,
        passing=passing + gathered,
        micro_batches=rows // micro,
    )


def count_parameters(settings: Settings, vocab_size: int) -> tuple[int, int]:
    """Parameters of the model and of one layer, including all experts."""
    with torch.device("meta"):
        model = Transformer(settings.model, vocab_size, torch.float32)
    every, layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    return every, layer


def routed_parameters(settings: Settings) -> int:
    """Parameters of all routed experts."""
    model = settings.model
    a_layer = 3 * model.num_experts * model.intermediate_size * model.hidden_size
    return 0 if model.experts == "dense" else model.num_hidden_layers * a_layer


def optimizer_bytes(settings: Settings, vocab_size: int, expert_parallel: int = 1) -> int:
    """Bytes of AdamW's two moments and, with Muon, of the momentum that its matrices have instead.

    Args:
        expert_parallel: number of ranks that the routed experts are split over; the bytes are those of one rank.
    """
    with torch.device("meta"):
        model = Transformer(settings.model, vocab_size, torch.float32)
    optimizer = make_optimizer(model, settings.optim)
    routed = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    total = 0
    for parameter in model.parameters():
        values = optimizer.initial_state(parameter).values()
        size = sum(value.nbytes for value in values if value.ndim)  # not the counts of steps
        total += size // expert_parallel if parameter in routed else size
    return total


def count_kept(settings: Settings, vocab_size: int, rows: int, dtype: torch.dtype) -> Kept:
    """What the forward pass of a micro-batch saves, from models of one and of two layers."""
    shallow = (settings.model.model_copy(update={"num_hidden_layers": layers}) for layers in (1, 2))
    compiled, length = settings.train.compile, settings.data.seq_len
    one, two = (_kept(shape.model_dump_json(), compiled, vocab_size, rows, length, dtype) for shape in shallow)
    return Kept(two - one, 2 * one - two)


@cache  # plans of other depths and shardings need the same two models
def _kept(shape: str, compiled: bool, vocab_size: int, rows: int, length: int, dtype: torch.dtype) -> int:
    shallow = ModelSettings.model_validate_json(shape)
    backend = shallow.experts if shallow.experts in ("dense", "megablocks") else "grouped_mm"
    with torch.device("meta"):
        model = Transformer(shallow, vocab_size, dtype)
        tokens_BT = torch.zeros(rows, length, dtype=torch.int64)
    with ExitStack() as stack:
        backends = Backends("varlen", backend, ())
        stack.enter_context(patch.object(model, "backends", lambda device: backends))
        stack.enter_context(patch.object(experts, "megablocks_experts", _as_megablocks))
        if compiled:
            model.compile_layers(backend=as_compiled())
            stack.callback(torch.compiler.reset)
        else:
            stack.enter_context(patch.object(attention, "torch_varlen", _FlashAttention.apply))
            stack.enter_context(patch.object(transformer, "rms_norm", _fused_norm))
        inputs = PackedTokens.one_sample_per_row(tokens_BT, tokens_BT)
        return kept_by(model, lambda: model(inputs))


def as_compiled() -> Callable[..., Any]:
    """A backend of torch.compile that saves for backward what Inductor would, without generating code."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def run_graph(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=run_graph,
        bw_compiler=run_graph,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )


def kept_by(model: Transformer, forward: Callable[[], Any]) -> int:
    """Bytes that autograd saves in a forward pass, counting each storage once, without the model's parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    kept = sum(storage.nbytes() for storage in storages.values())
    del output
    return kept


@uncompiled
def _as_megablocks(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Saves what megablocks saves: routed rows before and after each matmul, weights in the dtype of computation."""
    ends_E = torch.zeros(len(down_EDF), dtype=torch.int32, device=x_ND.device)
    sent_MD = x_ND.index_select(0, index_NK.flatten())
    hidden_MF = elementwise.swiglu(F.grouped_mm(sent_MD, gate_up_E2FD.transpose(1, 2), offs=ends_E))
    output_MD = F.grouped_mm(hidden_MF, down_EDF.transpose(1, 2), offs=ends_E)
    return (output_MD.view(*index_NK.shape, -1) * weight_NK[..., None].to(x_ND.dtype)).sum(1)


def _fused_norm(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Saves what torch's fused norm saves, its input in float32, as on CPU."""
    return elementwise._RMSNorm.apply(x_ND.float(), weight_D.float(), eps)


class _FlashAttention(torch.autograd.Function):
    """Saves what FlashAttention saves: inputs, output, and a number per query and head. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Any, longest: int) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out


def measure_peak(work: Callable[[], object]) -> int:
    """Peak bytes allocated on the CPU while ``work`` runs, beyond those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
