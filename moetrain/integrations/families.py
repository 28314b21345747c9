"""How each mixture-of-experts family of transformers turns its router logits into a choice of experts: one table.

A test builds a small random model of every family, reads the experts that its expert layers receive, and compares them
with what the row derives from the router logits. To support another family, add its row.

Shapes: N tokens, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

RECORDED = "router_logits"
"""The key of transformers' `_can_record_outputs` that names a model's routers."""


class FamilyError(ValueError):
    """A model whose routing cannot be read; the message says why and what can be done."""


@dataclass(frozen=True)
class Family:
    """One family's conventions. Names are attributes of the router, dotted, or of the model's config after ``config.``.

    Attributes:
        scores: of the router's output. ``softmax`` or ``sigmoid`` of logits; ``own``: the router's ``score_fn`` of
            logits; ``given``: the router returns the probabilities themselves.
        ranked: what the experts are ranked by, before the bias is added.
        bias: name of the bias that is added for the choice alone; empty: none.
        bias_is_argument: whether the router is called with the bias, as the argument of that name.
        groups: how a group of experts is ranked where only the best groups are used: by the sum of its two best
            scores, or by its best; empty: no groups. Routers with ``num_group`` None or ``topk_method`` greedy have
            none.
        outside: the score of experts in other groups.
        rows: name of the weight [E, D] whose rows are compared with those of the next layer.
        top_k: name of the number of experts per token.
        skips: last outputs that stand for no expert.
        remark: what else a reader of the routing should know.
    """

    scores: Literal["softmax", "sigmoid", "own", "given"] = "softmax"
    ranked: Literal["scores", "logits"] = "scores"
    bias: str = ""
    bias_is_argument: bool = False
    groups: Literal["", "two best", "best"] = ""
    outside: float = float("-inf")
    rows: str = "weight"
    top_k: str = "top_k"
    skips: int = 0
    remark: str = ""

    def probabilities(self, router: nn.Module, output_NE: Tensor) -> Tensor:
        """Routing probabilities over all experts before the cut, float32 [N, E]; each token's sum to 1.

        Sigmoid scores are divided by their sum. The bias of the choice is no part of them.
        """
        if self.scores == "softmax":
            return output_NE.float().softmax(-1)
        scores_NE = self._scores(router, output_NE)
        return scores_NE / scores_NE.sum(-1, keepdim=True)

    def choice(self, router: nn.Module, output_NE: Tensor, top_k: int, argument: Tensor | None = None) -> Tensor:
        """The experts of each token, int64 [N, K], in no particular order.

        Args:
            router: the module that returned ``output_NE``.
            argument: the bias that it was called with, where ``bias_is_argument``.
        """
        ranked_NE = self._scores(router, output_NE) if self.ranked == "scores" else output_NE.float()
        if self.bias_is_argument:
            ranked_NE = ranked_NE if argument is None else ranked_NE + argument.float().flatten()
        elif self.bias:
            ranked_NE = ranked_NE + attribute(router, self.bias).float().flatten()
        if self.groups and grouped(router):
            ranked_NE = self._within_groups(router, ranked_NE)
        return ranked_NE.topk(top_k, dim=-1).indices

    def _scores(self, router: nn.Module, output_NE: Tensor) -> Tensor:
        output_NE = output_NE.float()
        match self.scores:
            case "softmax":
                return output_NE.softmax(-1)
            case "sigmoid":
                return output_NE.sigmoid()
            case "own":
                scored: Tensor = attribute(router, "score_fn")(output_NE)
                return scored
            case "given":
                return output_NE

    def _within_groups(self, router: nn.Module, ranked_NE: Tensor) -> Tensor:
        groups = int(attribute(router, "num_group"))
        by_group_NGe = ranked_NE.view(len(ranked_NE), groups, -1)
        best_NG = by_group_NGe.topk(2 if self.groups == "two best" else 1, dim=-1).values.sum(-1)
        chosen = best_NG.topk(int(attribute(router, "topk_group")), dim=-1).indices
        inside_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter_(1, chosen, True)
        return by_group_NGe.masked_fill(~inside_NG[..., None], self.outside).flatten(1)


def grouped(router: nn.Module) -> bool:
    """Whether a router of a family with groups uses them."""
    return getattr(router, "num_group", None) is not None and getattr(router, "topk_method", "") != "greedy"


_SOFTMAX = Family()
_LOGITS = Family(ranked="logits", remark="weights are a softmax over the chosen experts")
_SIGMOID = Family("sigmoid")
_BIASED = Family("sigmoid", bias="e_score_correction_bias")
_GROUPED = Family("sigmoid", bias="e_score_correction_bias", groups="two best", remark="a shared expert beside them")
_OWN_SCORES = Family("own", bias="e_score_correction_bias")

FAMILIES: Mapping[str, Family] = {
    # Softmax over all experts, then the top k.
    "olmoe": _SOFTMAX,
    "flex_olmo": _SOFTMAX,
    "qwen2_moe": Family(remark="a shared expert beside them"),
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": Family(remark="a shared expert beside them"),
    "qwen3_5_moe_text": Family(remark="a shared expert beside them"),
    "qwen4_exp_text": _SOFTMAX,
    "mellum": _SOFTMAX,
    "lara_mini": _SOFTMAX,
    "mixtral": _SOFTMAX,
    "minimax": _SOFTMAX,
    "jamba": Family(remark="every second layer has experts"),
    "hunyuan_v1_moe": Family(rows="wg.weight", remark="a shared expert beside them"),
    "dbrx": Family(rows="layer.weight", top_k="config.ffn_config.moe_top_k"),
    "phimoe": Family(ranked="logits", remark="in training the choice is drawn at random around the logits"),
    "gemma4_text": Family("given", rows="proj.weight", top_k="config.top_k_experts"),
    "ernie4_5_moe": Family(bias="moe_statics.e_score_correction_bias", remark="a shared expert beside them"),
    "longcat_flash": Family(
        bias="e_score_correction_bias", rows="classifier.weight", remark="the last experts return their input"
    ),
    "zaya": Family(
        bias="balancing_biases", rows="down_proj.weight", skips=1, remark="the router is an MLP; its last class skips"
    ),
    "deepseek_v2": Family(groups="best", outside=0.0, remark="shared experts beside them"),
    "mistral4": Family(groups="two best", outside=0.0),
    # The top k of the logits, then a softmax or a sigmoid over the chosen ones.
    "gpt_oss": _LOGITS,
    "granitemoe": _LOGITS,
    "granitemoe_swa": _LOGITS,
    "granitemoehybrid": _LOGITS,
    "granitemoeshared": _LOGITS,
    "aria_text": _LOGITS,
    "jetmoe": Family(ranked="logits", rows="layer.weight", remark="two routers a layer: of attention, then of the MLP"),
    "cohere2_moe": _LOGITS,
    "llama4_text": Family("sigmoid", ranked="logits", remark="a shared expert beside them"),
    "kolibri1": Family("sigmoid", ranked="logits", bias="e_score_correction_bias"),
    # Sigmoid of each expert; most with a bias on the choice (loss-free balancing) and groups of experts (DeepSeek-V3).
    "flint": _SIGMOID,
    "lfm2_moe": Family("sigmoid", bias="expert_bias", bias_is_argument=True),
    "afmoe": Family("sigmoid", bias="expert_bias", bias_is_argument=True, rows="gate.weight"),
    "hy_v3": Family("sigmoid", bias="e_score_correction_bias", bias_is_argument=True),
    "minimax_m2": Family("sigmoid", bias="e_score_correction_bias", bias_is_argument=True),
    "minimax_m3_vl_text": _BIASED,
    "laguna": _BIASED,
    "inkling_text": Family("sigmoid", bias="e_score_correction_bias", remark="logits of shared experts are left out"),
    "inkling2_text": _OWN_SCORES,
    "inkling2_loop_text": _OWN_SCORES,
    "deepseek_v4": Family(
        "own", bias="e_score_correction_bias", remark="layers that route by a hash of the token have no logits"
    ),
    "beam": _GROUPED,
    "deepseek_v3": _GROUPED,
    "deepseek_v32": _GROUPED,
    "sarvam_mla": _GROUPED,
    "sarvam_moe": _GROUPED,
    "axk1": _GROUPED,
    "axk2": Family("sigmoid", bias="e_score_correction_bias", groups="two best", outside=0.0),
    "bailing_hybrid": _GROUPED,
    "dots1": _GROUPED,
    "dots3_note_text": _GROUPED,
    "exaone_moe": _GROUPED,
    "glm4_moe": _GROUPED,
    "glm4_moe_lite": _GROUPED,
    "glm_moe_dsa": _GROUPED,
    "hy_v4": _GROUPED,
    "kimi_linear": _GROUPED,
    "mimo_v2_flash": _GROUPED,
    "nemotron_h": _GROUPED,
    "solar_open": _GROUPED,
}
"""By ``config.model_type`` of the model that holds the routers."""

LEFT_OUT: Mapping[str, str] = {
    "doge": "its router scores two lists of keys, whose pairs are the experts: there are no logits by expert",
    "nllb_moe": "an encoder and a decoder, and experts of limited capacity: a token's experts depend on its batch",
    "switch_transformers": "an encoder and a decoder, and experts of limited capacity: a token's expert depends on its "
    "batch",
    "openai_privacy_filter": "it labels tokens and predicts none",
    "diffusion_gemma": "it is trained to denoise, not to predict the next token",
    "muse_spark": "it is no causal language model of transformers",
    "step3p7": "it reads images too",
    "aria": "it reads images too; its language model, aria_text, is read",
    "deepseek_ocr2": "it reads images too",
    "dots3_note": "it reads images too; its language model, dots3_note_text, is read",
    "ernie4_5_vl_moe": "it reads images too, with experts of their own",
    "gemma4": "it reads images too; its language model, gemma4_text, is read",
    "glm4v_moe": "it reads images too",
    "glm5_next": "it reads images too",
    "hy_v4_vl": "it reads images too",
    "inkling": "it reads images too; its language model, inkling_text, is read",
    "inkling2": "it reads images too; its language model, inkling2_text, is read",
    "inkling2_loop": "it reads images too; its language model, inkling2_loop_text, is read",
    "llama4": "it reads images too; its language model, llama4_text, is read",
    "minimax_m3_vl": "it reads images too; its language model, minimax_m3_vl_text, is read",
    "mistral_large4": "it reads images too",
    "qwen3_omni_moe": "it reads images and sound too",
    "qwen3_vl_moe": "it reads images too",
    "qwen3_5_moe": "it reads images too; its language model, qwen3_5_moe_text, is read",
    "qwen4_exp": "it reads images too; its language model, qwen4_exp_text, is read",
    "unlimited_ocr": "it reads images too",
}
"""Families with routers that have no row, each with the reason."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model, in the order of its layers."""

    family: Family
    modules: Sequence[nn.Module]
    output: int  # which of a router's outputs are the logits
    experts: int  # outputs of a router, those that stand for no expert among them
    top_k: int

    def rows(self) -> list[Tensor]:
        """The weight [E, D] of each router."""
        return [attribute(module, self.family.rows) for module in self.modules]


def find_routers(model: nn.Module) -> Routers:
    """The routers of a transformers model, bare or wrapped (PEFT, DDP).

    Raises:
        FamilyError: it has none, or its family has no row; or layers with different numbers of experts.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get(RECORDED)
        if config is None or recorded is None:
            continue
        kind = config.model_type
        if kind not in FAMILIES:
            why = LEFT_OUT.get(kind, "add its row to moetrain/integrations/families.py")
            raise FamilyError(f"the routing of {kind} models cannot be read: {why}")
        family = FAMILIES[kind]
        recorder = recorded[0] if isinstance(recorded, list) else recorded
        routers = [each for each in module.modules() if isinstance(each, recorder.target_class)]
        if not routers:
            continue  # the head alone; or all layers are dense
        experts = {_outputs(each, family) for each in routers}
        if len(experts) > 1:
            raise FamilyError(
                f"this {kind} has layers of {min(experts)} and of {max(experts)} experts: only models with equal "
                "numbers in all layers can be read"
            )
        named = family.top_k.removeprefix("config.")
        top_k = attribute(config if named != family.top_k else routers[0], named)
        return Routers(family, routers, recorder.index, experts.pop(), int(top_k))
    raise FamilyError(
        f"{type(model).__name__} has no router that transformers knows of: a mixture-of-experts model of transformers "
        "5 is needed, one with layers that have experts"
    )


def attribute(start: Any, dotted: str) -> Any:
    """An attribute of an attribute, by dotted name."""
    for name in dotted.split("."):
        start = getattr(start, name)
    return start


def _outputs(router: nn.Module, family: Family) -> int:
    if (classes := getattr(router, "num_router_classes", None)) is not None:
        return int(classes)
    rows = int(attribute(router, family.rows).shape[0])
    return rows - int(getattr(router, "n_shared_experts", 0))
