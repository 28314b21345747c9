"""The collectives of a training step, counted on each of several gloo ranks:

    python -m tests.distributed.counted_collectives VARIANT[,VARIANT ...] [section.key=value ...]

The main rank prints, by variant and kind of collective, its number and the bytes that went into it, mean over ranks.
"""

import sys
from collections import Counter

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.config import load_settings
from moetrain.distributed.sharding import evaluation
from moetrain.routing.claims import panel_claims
from moetrain.routing.panel import SEEN, read_panel
from moetrain.trainer import Trainer
from tests.distributed.sharded_model import Model, run_checks

VARIANTS = {
    "plain": [],
    "accumulated": ["train.micro_batch_rows=2"],
    "recomputed": ["train.activation_checkpointing=true", "train.micro_batch_rows=2"],
    "bf16": ["train.precision=bf16"],
    "tied": ["model.tie_word_embeddings=true", "model.num_shared_experts=1", "train.activation_checkpointing=true"],
    "muon": ["optim.name=muon"],
    "dense": ["model.experts=dense"],
    "uneven": ["model.num_experts=5", "optim.name=muon"],  # sharded along their rows
}
MONITOR = "monitor"
KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "gather": "gather",
}


class Counted(TorchDispatchMode):
    """Counts collectives by kind, and the bytes that this rank puts in; single numbers, as of norms, do not count."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does by collectives of plain tensors is counted
        if operator.namespace in ("c10d", "_c10d_functional"):
            self._note(operator, args)
        return operator(*args, **kwargs or {})

    def _note(self, operator, args):
        name = operator._schema.name.partition("::")[2]
        kind = next((kind for part, kind in KINDS.items() if part in name), None)
        if kind is None:
            assert any(part in name for part in ("broadcast", "wait_tensor", "wrap_tensor")), name
            return
        has_output = operator.namespace == "c10d" and "allreduce" not in name
        given = args[1] if has_output else args[0]  # (output, input, ...), or the input alone
        tensors = given if isinstance(given, list) else [given]
        size = sum(tensor.nbytes for tensor in tensors)
        if sum(tensor.numel() for tensor in tensors) > 1:
            self.count[kind] += 1
            self.bytes[kind] += size


def monitored(settings):
    """The bytes that the ranks send, by what for, once windows are full; and how many samples those hold."""
    trainer = Trainer.build(settings)
    layout, monitor, found = trainer.layout, trainer.monitor, {}
    for step in range(1, settings.train.max_steps + 1):
        trainer.train_step(step)
    state = trainer.state.monitor
    windows = [0]

    def exposures():
        held = state.exposures.windows()
        windows[0] = 0 if held is None else len(held)

    with evaluation(trainer.model) as model:
        parts = {
            "panel": lambda: read_panel(model, state.panel.panel, 1, layout),
            "claims": lambda: panel_claims(model, state.panel.panel, settings.train.max_steps, layout),
            "stream": state.stream.windows,
            "exposures": exposures,
        }
        for name, part in parts.items():
            with Counted() as mode:
                part()
            sent = layout.all_gather_objects(mode.bytes["gather"])
            found[name] = {"gather": sum(sent), "all_reduce": mode.bytes["all_reduce"]}
    monitor.close()
    members = len(state.panel.panel), int((state.panel.panel.cell == SEEN).sum())
    return found | {"members": members, "exposed": windows[0]}


def count(name, settings, layout, corpus):
    if name == MONITOR:
        return monitored(settings)
    model = Model(load_settings(None, [*sys.argv[2:], *VARIANTS[name]]), layout, corpus)
    model.train(0)  # the first step sets FSDP and DDP up
    with Counted() as mode:
        model.train(1)
    everyone = layout.all_gather_objects((mode.count, mode.bytes))
    assert all(counts == mode.count for counts, _ in everyone)
    return {kind: (mode.count[kind], sum(sizes[kind] for _, sizes in everyone) / len(everyone)) for kind in mode.count}


if __name__ == "__main__":
    run_checks(count)
