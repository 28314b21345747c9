"""What ranks send in a training step: every collective with its group, bytes and number, from the model's parameters.

This is written from what `moetrain.distributed` does, and a test compares it with collectives counted in running steps
of several layouts. Bytes are those of the tensors that a rank puts in: the buffer of an all-reduce, the own shard of an
all-gather, the whole input of a reduce-scatter or an all-to-all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Literal

import torch
from torch import nn

from moetrain.config import ModelSettings, Settings, SettingsError
from moetrain.distributed.mesh import Sharding, count_shards, expert_mesh_shape
from moetrain.distributed.sharding import read_in_float32, sharded_dimension
from moetrain.models.transformer import Experts, Transformer

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

Overlap = Literal["none", "backward", "step"]
"""What a collective is hidden behind: nothing, the backward pass of the last micro-batch, or the whole step."""

_FLOAT32, _FLOAT64, _INT64 = 4, 8, 8
_DDP_BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces together
_BF16 = 2


@dataclass(frozen=True)
class RankLayout:
    """How ranks share a model: the numbers of `moetrain.distributed.mesh`, without a process group.

    Ranks of one machine are consecutive.

    Raises:
        SettingsError: the ranks do not split like that.
    """

    ranks: int
    machine: int  # ranks on a machine
    sharding: Sharding
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        expert_mesh_shape(self.expert_parallel, self.sharding, self.ranks, self._local)
        if self.sharding == "hybrid" and self.ranks % self._local:
            raise SettingsError(f"train.sharding=hybrid: {self.ranks} ranks are not machines of {self.machine}")

    @property
    def shards(self) -> int:
        """Ranks that share one replica of the model."""
        return count_shards(self.sharding, self.ranks, self._local)

    @property
    def replicas(self) -> int:
        return self.ranks // self.shards

    @property
    def expert_shards(self) -> int:
        """Ranks of a replica that share each expert."""
        return expert_mesh_shape(self.expert_parallel, self.sharding, self.ranks, self._local)[1]

    @property
    def expert_replicas(self) -> int:
        return expert_mesh_shape(self.expert_parallel, self.sharding, self.ranks, self._local)[0]

    @property
    def _local(self) -> int:
        return min(self.machine, self.ranks)


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step.

    Attributes:
        purpose: for people.
        nbytes: that a rank puts into all of them, with what stays on it.
        count: number of collectives in a step.
        group: ranks that take part.
        stride: distance between their numbers.
    """

    purpose: str
    kind: Kind
    nbytes: float
    count: int
    group: int
    stride: int = 1
    overlap: Overlap = "none"

    @property
    def sent(self) -> float:
        """Bytes that a rank sends to others, with rings for all but all-to-all."""
        others = self.group - 1
        if self.kind == "all_gather":
            return others * self.nbytes
        return (2 if self.kind == "all_reduce" else 1) * others / self.group * self.nbytes


def step_collectives(
    settings: Settings, vocab_size: int, layout: RankLayout, itemsize: int = _BF16
) -> list[Collective]:
    """The collectives of a training step, with those that take part in a single rank left out.

    Args:
        itemsize: bytes of an element in matmuls.
    """
    rows = settings.train.batch_rows // layout.ranks
    micro_batches = rows // (settings.train.micro_batch_rows or rows)
    tokens = rows * settings.data.seq_len
    found = [
        *_gradients_and_weights(settings, vocab_size, layout, micro_batches, itemsize),
        *_exchanges(settings, layout, tokens, micro_batches, itemsize),
        *_orthogonalization(settings, vocab_size, layout, itemsize),
        *_statistics(settings, vocab_size, layout),
    ]
    return [each for each in found if each.group > 1 and each.nbytes]


def _gradients_and_weights(
    settings: Settings, vocab_size: int, layout: RankLayout, micro_batches: int, itemsize: int
) -> Iterator[Collective]:
    groups, layers = parameter_groups(settings.model, vocab_size), settings.model.num_hidden_layers
    split = layout.expert_parallel > 1
    own = {name: [_Shape(shape, _along(shape, layout)) for shape in shapes] for name, shapes in groups.items()}
    if split:
        own["experts"] = _split_experts(groups["experts"], layout)
    else:
        own["layer"], own["experts"] = [*own["layer"], *own["experts"]], []
    if layout.shards == 1:
        whole = _FLOAT32 * (_elements(own["root"]) + layers * _elements(own["layer"]))
        buckets = ceil(whole / _DDP_BUCKET)
        yield Collective("gradients", "all_reduce", whole, buckets, layout.ranks, 1, "backward")
        experts = _FLOAT32 * layers * _elements(own["experts"])
        count = layers * len(own["experts"])
        group, stride = layout.expert_replicas, layout.expert_parallel
        yield Collective("gradients of experts", "all_reduce", experts, count, group, stride)
        return
    dense = ("root", _FLOAT32, 1, layout.shards, 1, layout.replicas, layout.shards)
    cast = ("layer", itemsize, layers, *dense[3:])
    expert_stride, expert_apart = layout.expert_parallel, layout.expert_parallel * layout.expert_shards
    experts_of_rank = layout.expert_shards, expert_stride, layout.expert_replicas, expert_apart
    parts = [dense, cast, *([("experts", itemsize, layers, *experts_of_rank)] if split else [])]
    for name, size, number, shards, stride, replicas, apart in parts:
        shard = sum(each.shard(shards) for each in own[name]) * number
        of = {"root": " outside of layers", "layer": " of layers", "experts": " of experts"}[name]
        passes = 1 if name == "root" else 2  # the root stays gathered for backward
        gathered, times = size * shard * passes * micro_batches, number * passes * micro_batches
        hidden: Overlap = "none" if name == "root" else "step"
        yield Collective("weights" + of, "all_gather", gathered, times, shards, stride, hidden)
        whole = _FLOAT32 * shard * shards
        yield Collective("gradients" + of, "reduce_scatter", whole, number, shards, stride, "backward")
        yield Collective("gradients" + of, "all_reduce", _FLOAT32 * shard, number, replicas, apart, "backward")


def _exchanges(
    settings: Settings, layout: RankLayout, tokens: int, micro_batches: int, itemsize: int
) -> Iterator[Collective]:
    if layout.expert_parallel == 1:
        return
    layers, again = settings.model.num_hidden_layers, settings.train.activation_checkpointing
    count = layers * micro_batches * (7 + (again and (4 if settings.model.num_shared_experts else 3)))
    size = exchanged_bytes(settings, tokens, micro_batches, itemsize)
    yield Collective("tokens to experts and back", "all_to_all", size, count, layout.expert_parallel)


def exchanged_bytes(settings: Settings, tokens: int, micro_batches: int, itemsize: int = _BF16) -> int:
    """Bytes that a rank puts into the all-to-alls of a step, with what stays on it; see `models.experts_exchange`.

    Args:
        tokens: of the rank in all micro-batches, padding included.
        itemsize: bytes of an element of a row.
    """
    model = settings.model
    row, weight, counts = model.hidden_size * itemsize, 4, 4 * model.num_experts * micro_batches
    rows = tokens * model.num_experts_per_tok
    both = rows * 2 * (2 * row + weight) + counts
    if settings.train.activation_checkpointing:
        # The forward pass is repeated up to the last tensor that backward needs: outputs are not sent again unless the
        # shared expert comes after them.
        both += rows * (row + weight + (row if model.num_shared_experts else 0)) + counts
    return model.num_hidden_layers * both


def _orthogonalization(settings: Settings, vocab_size: int, layout: RankLayout, itemsize: int) -> Iterator[Collective]:
    """Muon gathers each sharded matrix, except experts' that are sharded by expert."""
    if settings.optim.name != "muon" or layout.shards == 1:
        return
    model = settings.model
    layers, groups = model.num_hidden_layers, parameter_groups(model, vocab_size)
    matrices: list[tuple[int, ...]] = [shape for shape in groups["layer"] if len(shape) == 2]
    if layout.expert_parallel == 1:  # experts that are split by number are whole
        matrices += [shape for shape in groups["experts"] if _along(shape, layout)]
    shard = sum(_Shape(shape, _along(shape, layout)).shard(layout.shards) for shape in matrices)
    count = layers * len(matrices)
    yield Collective("momentum of matrices", "all_gather", layers * itemsize * shard, count, layout.shards)
    if layout.expert_parallel > 1:
        experts = _split_experts(groups["experts"], layout)
        shard = sum(each.shard(layout.expert_shards) for each in experts)
        count, group = layers * len(experts), layout.expert_shards
        size = layers * itemsize * shard
        yield Collective("momentum of experts", "all_gather", size, count, group, layout.expert_parallel)


def _statistics(settings: Settings, vocab_size: int, layout: RankLayout) -> Iterator[Collective]:
    """Losses and loads of a step, norms of gradients, and the signals of ranks."""
    model, domains = settings.model, len(settings.data.domains)
    groups, layers, split = parameter_groups(model, vocab_size), model.num_hidden_layers, layout.expert_parallel > 1
    of_experts = layers * len(groups["experts"])
    others = len(groups["root"]) + layers * len(groups["layer"]) + (0 if split else of_experts)
    purpose = "norms of gradients"
    if layout.shards > 1:
        yield Collective(purpose, "all_reduce", _FLOAT32 * others, 1, layout.shards)
    if split:
        size, apart = _FLOAT32 * of_experts, layout.expert_parallel
        yield Collective(purpose, "all_reduce", size, 1, layout.expert_shards, apart)
        yield Collective(purpose, "all_reduce", size, 1, layout.expert_parallel)
    routed = 0 if model.experts == "dense" else model.num_hidden_layers * (2 + 2 * model.num_experts)
    size = _FLOAT64 * (2 * domains + routed)
    yield Collective("losses and loads of experts", "all_reduce", size, 1, layout.ranks)
    yield Collective("stop signals", "all_reduce", _INT64, 1, layout.ranks)


def _along(shape: tuple[int, ...], layout: RankLayout) -> int:
    return sharded_dimension(shape, layout.shards)


@dataclass(frozen=True)
class _Shape:
    """A parameter's shape, and the dimension along which it is sharded."""

    sizes: tuple[int, ...]
    along: int

    def shard(self, shards: int) -> int:
        """Elements of a rank's shard, padded to equal shards."""
        rest = prod(self.sizes) // self.sizes[self.along]
        return ceil(self.sizes[self.along] / shards) * rest


def _split_experts(shapes: Iterable[tuple[int, ...]], layout: RankLayout) -> list[_Shape]:
    """A rank's experts, which are sharded along their second dimension."""
    return [_Shape((experts // layout.expert_parallel, *rest), 1) for experts, *rest in shapes]


def _elements(shapes: Iterable[_Shape]) -> int:
    return sum(prod(each.sizes) for each in shapes)


def parameter_groups(model: ModelSettings, vocab_size: int) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of parameters as `moetrain.distributed.sharding.shard` groups them.

    ``root``: outside of layers, and all routers and norms; ``layer``: of one layer, read in the dtype of matmuls;
    ``experts``: the routed experts of one layer.
    """
    return _parameter_groups(model.model_dump_json(), vocab_size)


@cache
def _parameter_groups(model_json: str, vocab_size: int) -> dict[str, list[tuple[int, ...]]]:
    with torch.device("meta"):
        model = Transformer(ModelSettings.model_validate_json(model_json), vocab_size, torch.bfloat16)
    layers = model.model.layers
    in_float32, layer = read_in_float32(layers), layers[0]
    experts = {p for module in layer.modules() if isinstance(module, Experts) for p in module.parameters()}
    cast = [p for p in layer.parameters() if p not in in_float32 and p not in experts]
    in_layers = {p for each in layers for p in each.parameters()} - in_float32
    root = [p for p in model.parameters() if p not in in_layers]

    def shapes(parameters: Iterable[nn.Parameter]) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in parameters]

    return {
        "root": shapes(root),
        "layer": shapes(cast),
        "experts": shapes(p for p in layer.parameters() if p in experts),
    }
