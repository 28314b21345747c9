"""Tiny random models of transformers' mixture-of-experts families."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96

# Names that the families' configs use for the same few sizes; each config is given those that it has.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # of families with latent attention
_SPECIAL = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    },
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"layer_types": None, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
    "mistral4": {"head_dim": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
}
_CLASSES = {"mistral4": "Mistral4ForCausalLM"}  # unknown to AutoModelForCausalLM


def tiny_config(model_type, **changes):
    """The config of a small model of a family."""
    default = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in _SIZES.items() if _has(default, name)}
    if hasattr(default, "qk_rope_head_dim"):
        sizes |= _LATENT
    kinds = getattr(default, "layer_types", None)
    if kinds is not None and len(kinds) > 3:
        sizes["layer_types"] = list(kinds[-3:])
    chosen = sizes | _SPECIAL.get(model_type, {}) | changes
    return AutoConfig.for_model(model_type, **{name: value for name, value in chosen.items() if value is not None})


def tiny_model(model_type, seed=0, **changes):
    """A small random model of a family in evaluation mode, computing in float32."""
    torch.manual_seed(seed)
    build = getattr(transformers, _CLASSES[model_type]) if model_type in _CLASSES else AutoModelForCausalLM.from_config
    return build(tiny_config(model_type, **changes)).float().eval()


def _has(config, name):
    try:
        return hasattr(config, name)
    except Exception:  # of a class of transformers, for sizes that differ between layers
        return True
