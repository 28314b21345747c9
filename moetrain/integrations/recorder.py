"""The routing of any mixture-of-experts model of transformers, read by hooks on its routers.

`output_router_logits` would add the balancing loss to the loss and keep all logits; the hooks change nothing and keep
sums per sample. They record inside `RouterRecorder.recording` alone: not in another pass, nor where gradient
checkpointing computes a layer again.

Shapes: B rows, T tokens per row, R halves of samples, L layers, E experts, D hidden size, N = B * T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moetrain.integrations.families import FamilyError, find_routers
from moetrain.models.router import LayerRouting, RecordingMasks


class RouterRecorder:
    """Reads the routers of a model.

    Args:
        model: of transformers, bare or wrapped (PEFT).

    Raises:
        FamilyError: its routing cannot be read, see `moetrain.integrations.families.find_routers`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        self._masks: RecordingMasks | None = None
        self._statistics = True
        self._found: dict[int, LayerRouting] = {}
        self._hooks = [
            router.register_forward_hook(self._hook(number), with_kwargs=True)
            for number, router in enumerate(self.routers.modules)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, masks: RecordingMasks, statistics: bool = True) -> None:
        """Record the next forward pass.

        Args:
            masks: the tokens that count, of all tokens that the model is given.
            statistics: whether to record more than the sums of probabilities; without, all else is empty.
        """
        self._masks, self._statistics, self._found = masks, statistics, {}

    def end(self) -> list[LayerRouting]:
        """The routing of the pass, one for each router, in the order of layers; records no more.

        Raises:
            FamilyError: the pass did not run each router once.
        """
        found, self._masks, self._found = self._found, None, {}
        if len(found) != len(self.routers.modules):
            raise FamilyError(
                f"the forward pass ran {len(found)} of the model's {len(self.routers.modules)} routers: its routing "
                "cannot be read"
            )
        return [found[number] for number in range(len(found))]

    def drop(self) -> None:
        """Record no more, and forget what was recorded: after a pass that failed."""
        self._masks, self._found = None, {}

    @contextmanager
    def recording(self, masks: RecordingMasks) -> Iterator[list[LayerRouting]]:
        """Record the pass inside; the list is filled at its end. Arguments and errors as `begin` and `end`."""
        self.begin(masks)
        found: list[LayerRouting] = []
        try:
            yield found
            found.extend(self.end())
        finally:
            self.drop()

    def _hook(self, number: int) -> Any:
        @torch.compiler.disable
        @torch.no_grad()
        def record(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._masks is None:
                return
            if number in self._found:
                raise FamilyError("the model runs its layers more than once in a pass: its routing cannot be read")
            self._found[number] = self._layer(self._masks, router, args, kwargs, output)

        return record

    def _layer(
        self, masks: RecordingMasks, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> LayerRouting:
        routers = self.routers
        logits_NE = output[routers.output] if isinstance(output, tuple) else output
        logits_NE = logits_NE.detach().reshape(-1, routers.experts).float()
        rows, _, row_length = masks.halves_BRT.shape
        if len(logits_NE) != rows * row_length:
            raise FamilyError(
                f"a router was given {len(logits_NE)} tokens, the model {rows * row_length}: the routing of its "
                "samples cannot be told"
            )
        probs_NE = routers.family.probabilities(router, logits_NE)
        sums_BRE = torch.bmm(masks.halves_BRT, probs_NE.view(rows, row_length, -1))
        nothing = logits_NE.new_zeros(0)
        if not self._statistics:
            return LayerRouting(sums_BRE, nothing, nothing, nothing, nothing, nothing, nothing)
        argument = next((each for each in (*args[1:], *kwargs.values()) if torch.is_tensor(each)), None)
        index_NK = routers.family.choice(router, logits_NE, routers.top_k, argument)
        sent_NE = torch.zeros_like(probs_NE).scatter_(1, index_NK, 1.0)
        inputs_BRD = nothing
        if masks.layer_inputs:
            inputs_BRD = torch.bmm(masks.halves_BRT, args[0].detach().float().reshape(rows, row_length, -1))
        return LayerRouting(
            sums_BRE=sums_BRE,
            counts_BRE=torch.bmm(masks.halves_BRT, sent_NE.view(rows, row_length, -1)),
            probs_E=masks.real_N @ probs_NE,
            load_E=masks.real_N @ sent_NE,
            z=masks.real_N @ logits_NE.logsumexp(-1).square(),
            entropy=masks.real_N @ -torch.special.xlogy(probs_NE, probs_NE).sum(-1),
            inputs_BRD=inputs_BRD,
        )
