"""What vLLM (read) and llama.cpp (run) make of an exported model; see ``README.md`` in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EPSILON = 1e-5  # a constant of both programs for OLMoE


def serving_limits(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """By program, why it refuses a model or computes other logits, each one clause; empty lists where it does neither.

    Args:
        config: ``config.json`` of the exported folder.
    """
    both = []
    if config["norm_topk_prob"]:
        both.append("it computes other logits, because norm_topk_prob is true and it ignores that")
    if config["rms_norm_eps"] != _EPSILON:
        both.append(
            f"it computes other logits, with an rms_norm_eps of {_EPSILON:g} instead of {config['rms_norm_eps']:g}"
        )
    if config["tie_word_embeddings"]:
        both.append("it refuses the model, because tied embeddings have no lm_head.weight")
    grouped = config["num_key_value_heads"] != config["num_attention_heads"]
    refusal = "it refuses the model, because num_key_value_heads differs from num_attention_heads"
    return {"vLLM": both, "llama.cpp": [*both, refusal] if grouped else both}
