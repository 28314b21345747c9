"""A mixture-of-experts model of transformers with the interface of ours, for replays of families that we have not.

Losses, panel, probes and claims are computed by the functions that read our own models: only the hidden states and the
routing come from transformers.

Shapes: B rows, T tokens per row, S samples (with T tokens of the longest), R halves of samples per row, D hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config import ModelSettings
from moetrain.integrations.families import FAMILIES, FamilyError, Routers, find_routers
from moetrain.integrations.recorder import RouterRecorder
from moetrain.model_input import PackedTokens
from moetrain.models.hf import OlmoeError, read_olmoe, read_settings
from moetrain.models.router import RecordingMasks
from moetrain.models.transformer import Linear, Routing, Transformer

_SAME = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest logit
_TRIED_TOKENS = 8


class ForeignModel(Transformer):
    """A causal language model of transformers, in evaluation mode.

    Args:
        model: its weights are those of ``dtype``.
        dtype: of the matmuls.

    Raises:
        FamilyError: its routing cannot be read, or its logits are not the last hidden states times a matrix.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # ours has other parts
        self.inner = model.eval()
        self.recorder = RouterRecorder(model)
        self.settings = _settings(self.recorder.routers, model)
        self.dtype = dtype
        self.recompute = False
        weight_VD = self._head()
        with torch.device("meta"):
            self.lm_head = Linear(*reversed(weight_VD.shape))
        self.lm_head.weight = nn.Parameter(weight_VD, requires_grad=False)

    def router_weights(self) -> list[Tensor]:
        return self.recorder.routers.rows()

    def _hidden_states(self, inputs: PackedTokens, record_layer_inputs: bool) -> tuple[Tensor, Routing]:
        rows, row_length = inputs.tokens_BT.shape
        device = inputs.tokens_BT.device
        spans_N2 = inputs.spans_N2.to(device)
        start_S, length_S = spans_N2[inputs.slots_BT.flatten()[spans_N2[:, 0]] >= 0].unbind(1)
        offset = torch.arange(int(length_S.max()) if len(length_S) else 1, device=device)
        valid_ST = offset < length_S[:, None]
        place_ST = torch.where(valid_ST, start_S[:, None] + offset, start_S[:, None])
        halves = torch.arange(2 * inputs.slots_per_row, device=device)
        recorded_ST = torch.where(valid_ST, inputs.recorded_BT.flatten()[place_ST], -1)
        masks = RecordingMasks(
            real_N=valid_ST.flatten().float(),
            halves_BRT=(recorded_ST[:, None, :] == halves[None, :, None]).float(),
            layer_inputs=record_layer_inputs,
        )
        with self.recorder.recording(masks) as layers:
            tokens_ST = torch.where(valid_ST, inputs.tokens_BT.flatten()[place_ST], 0)
            output = self._base(input_ids=tokens_ST, attention_mask=valid_ST.long(), use_cache=False)
        hidden_ND = output.last_hidden_state.new_zeros(
            rows * row_length, self.settings.hidden_size, dtype=torch.float32
        )
        hidden_ND[place_ST[valid_ST]] = output.last_hidden_state[valid_ST].float()
        row_S = start_S // row_length

        def by_row(sums_SRX: Tensor) -> Tensor:
            if not sums_SRX.numel():
                return sums_SRX if sums_SRX.ndim == 1 else sums_SRX.new_zeros(rows, *sums_SRX.shape[1:])
            return sums_SRX.new_zeros(rows, *sums_SRX.shape[1:]).index_add_(0, row_S, sums_SRX)

        per_row = ("sums_BRE", "counts_BRE", "inputs_BRD")
        return hidden_ND, Routing.stack(
            [layer._replace(**{name: by_row(getattr(layer, name)) for name in per_row}) for layer in layers]
        )

    @property
    def _base(self) -> Any:
        """The model without its head."""
        return self.inner.base_model

    @torch.no_grad()
    def _head(self) -> Tensor:
        """The matrix [V, D] that turns last hidden states into logits, with the family's factor."""
        output, config = self.inner.get_output_embeddings(), self.inner.config
        kind = config.model_type
        if getattr(output, "bias", None) is not None:
            raise FamilyError(f"the logits of this {kind} have a bias, which is not read")
        if getattr(config, "final_logit_softcapping", None):
            raise FamilyError(f"the logits of this {kind} are capped (final_logit_softcapping), which is not read")
        tokens = torch.arange(_TRIED_TOKENS, device=output.weight.device)[None]
        hidden_TD = self._base(input_ids=tokens, use_cache=False).last_hidden_state[0]
        product_TV = (hidden_TD @ output.weight.T.to(hidden_TD.dtype)).float()
        logits_TV = self.inner(input_ids=tokens, use_cache=False).logits[0].float()
        factor = (logits_TV * product_TV).sum() / product_TV.square().sum()
        error = float((logits_TV - factor * product_TV).abs().max() / logits_TV.abs().max())
        if not error <= _SAME.get(self.dtype, 1e-3):
            raise FamilyError(
                f"the logits of this {kind} are not its last hidden states times a matrix: it is not read"
            )
        return output.weight.detach() if abs(float(factor) - 1) < 1e-3 else output.weight.detach() * factor


def open_folder(folder: Path, dtype: torch.dtype) -> Transformer:
    """The model of a transformers folder: ours where we have the architecture, else transformers' own.

    Raises:
        OlmoeError, FamilyError: there is none that can be read; the message names the folder.
    """
    if not _is_foreign(folder):
        return read_olmoe(folder, dtype)
    from transformers import AutoModelForCausalLM

    try:
        return ForeignModel(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True), dtype)
    except FamilyError as error:
        raise FamilyError(f"{folder}: {error}") from None
    except Exception as error:  # many classes, of transformers, safetensors and torch
        raise FamilyError(f"{folder}: transformers cannot read it: {_first_line(error)}") from None


def folder_settings(folder: Path) -> ModelSettings:
    """The settings of a folder's model; where it is not ours, its sizes alone. No weights are read.

    Raises:
        OlmoeError, FamilyError: as `open_folder`.
    """
    if not _is_foreign(folder):
        return read_settings(folder)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        return _settings(find_routers(model), model)
    except FamilyError as error:
        raise FamilyError(f"{folder}: {error}") from None
    except Exception as error:
        raise FamilyError(f"{folder}: transformers cannot read it: {_first_line(error)}") from None


def _is_foreign(folder: Path) -> bool:
    """Whether the model has to be read through transformers.

    Raises:
        OlmoeError: it cannot be read at all.
    """
    try:
        read_settings(folder)
    except OlmoeError:
        config = folder / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
        if kind not in FAMILIES:
            raise
        return True
    return False


def _settings(routers: Routers, model: Any) -> ModelSettings:
    return ModelSettings(
        hidden_size=model.get_input_embeddings().weight.shape[1],
        num_hidden_layers=len(routers.modules),
        num_attention_heads=1,
        num_experts=routers.experts,
        num_experts_per_tok=routers.top_k,
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
