"""Write a model as a folder for transformers' `OlmoeForCausalLM`, and read such a folder, or one of Qwen3-MoE.

On disk each expert has its own tensors (``mlp.experts.7.gate_proj.weight``), which transformers 4 and 5 read. Ours are
stacked, gate before up, as in transformers 5's memory. A dense model is written as an OLMoE with one expert, whose
routing weight is always 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config import ModelSettings
from moetrain.models.experts_grouped import unaligned_width
from moetrain.models.transformer import Transformer

SHARD_BYTES = 5_000_000_000
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# Settings that transformers' config has under the same name, and its defaults for a file that omits them.
_SHARED: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "intermediate_size": 2048,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.01,
}
# Qwen3-MoE's: other names, and other defaults.
_QWEN_NAMES = {"intermediate_size": "moe_intermediate_size", "num_experts": "num_local_experts"}
_QWEN_DEFAULTS = {
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "num_experts": 128,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
}
# Options of its config that our model does not have, and the values that disable them.
_UNSUPPORTED = {"clip_qkv": None, "attention_bias": False, "hidden_act": "silu"}
_QWEN_UNSUPPORTED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


class OlmoeError(ValueError):
    """A model that transformers' OLMoE cannot express, or a folder without a readable one; one line."""


def olmoe_config(
    settings: ModelSettings, vocab_size: int, longest: int, begin: int, end: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        longest: tokens of the longest sample that the model was trained on.
        begin, end: ids of the tokenizer's begin and end mark.
        dtype: of the weights on disk.

    Raises:
        OlmoeError: a setting that transformers' OLMoE does not have; names it.
    """
    if settings.num_shared_experts:
        raise OlmoeError(
            f"model.num_shared_experts={settings.num_shared_experts}: transformers' OLMoE has no shared expert: "
            "only a model trained without one can be exported"
        )
    if settings.balancing == "bias":
        raise OlmoeError(
            "model.balancing=bias: transformers' OLMoE selects experts without a bias: "
            "only a model trained with aux or none can be exported"
        )
    if settings.qk_norm == "head" or settings.head_width * settings.num_attention_heads != settings.hidden_size:
        raise OlmoeError(
            f"model.qk_norm={settings.qk_norm}, model.head_dim={settings.head_dim}: transformers' OLMoE has norms over "
            "all heads and heads of hidden_size / num_attention_heads: only such a model can be exported"
        )
    config = {name: getattr(settings, name) for name in _SHARED} | {"num_key_value_heads": settings.key_value_heads}
    if settings.experts == "dense":
        width = settings.num_experts_per_tok * settings.intermediate_size
        config |= {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": width, "norm_topk_prob": False}
    if not fits_grouped_mm(settings):
        config["experts_implementation"] = "eager"  # its default raises an error
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **config,
        **_UNSUPPORTED,
        "attention_dropout": 0.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": longest,
        "rope_theta": settings.rope_theta,
        "rope_scaling": None,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": None,  # the default would exclude token 1 from training
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def fits_grouped_mm(settings: ModelSettings) -> bool:
    """Whether transformers' default experts take the exported model in every dtype."""
    return unaligned_width(settings, torch.bfloat16) is None


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a model's weights as safetensors under transformers' names; returns the files, of ``shard_bytes`` each.

    Copies one shard at a time, so a large model needs little more memory than its weights.

    Raises:
        OSError: they could not be written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in _tensors_on_disk(model):
        bytes_ = tensor.numel() * dtype.itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_
        total += bytes_
    count = len(shards)
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [_WEIGHTS]
    for file, shard in zip(files, shards, strict=True):
        copies = {name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in shard.items()}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # safetensors makes its files readable for the owner only
        try:
            save_file(copies, path, metadata={"format": "pt"})
        except SafetensorError as error:  # also wraps errors of the system, such as a full disk
            raise OSError(f"{path} could not be written: {error}") from None
        path.chmod(mode)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [folder / file for file in files]


def _tensors_on_disk(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the files; the tensors are views of the model's."""
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        layer, _, weight = name.partition(".mlp.")
        if name == "lm_head.weight" and model.settings.tie_word_embeddings:
            continue
        if weight.startswith("gate_up_proj"):  # of the dense twin
            yield f"{layer}.mlp.gate.weight", tensor.new_zeros(1, tensor.shape[1])
        if weight.startswith(("experts.gate_up_proj", "gate_up_proj")):
            for expert, gate_up in enumerate(tensor.view(-1, *tensor.shape[-2:])):
                gate, up = gate_up.chunk(2)
                yield f"{layer}.mlp.experts.{expert}.gate_proj.weight", gate
                yield f"{layer}.mlp.experts.{expert}.up_proj.weight", up
        elif weight.startswith(("experts.down_proj", "down_proj")):
            for expert, down in enumerate(tensor.view(-1, *tensor.shape[-2:])):
                yield f"{layer}.mlp.experts.{expert}.down_proj.weight", down
        else:
            yield name, tensor


def find_olmoe(name: str, weights: bool = True) -> Path:
    """The folder of a transformers model: a local one, or a snapshot of the hub's ``OWNER/NAME[@REVISION]``.

    Args:
        weights: whether to download the weights too, not only configuration and tokenizer.

    Raises:
        OlmoeError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if repository is None or name.startswith((".", "/", "~")):
        raise OlmoeError(f"{name}: no such folder: name a folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"] if weights else ["*.json"]
    try:
        return Path(snapshot_download(repository[1], revision=repository[2], allow_patterns=patterns))
    except Exception as error:  # many classes, of the package and of its HTTP client
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OlmoeError(f"{name}: no such folder, and the download from the hub failed: {reason}") from None


def read_settings(folder: Path) -> tuple[ModelSettings, int]:
    """The model settings and the vocabulary size of a folder's ``config.json``.

    Raises:
        OlmoeError: no config.json, another architecture, or an option that our model does not have; names it.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        model_type, vocab_size = config.get("model_type"), config.get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise OlmoeError(f"{folder}: no transformers model here ({_CONFIG}: {error})") from None
    if model_type not in ("olmoe", "qwen3_moe"):
        raise OlmoeError(f"{folder}/{_CONFIG}: model_type {model_type!r}: only 'olmoe' and 'qwen3_moe' can be read")
    qwen = model_type == "qwen3_moe"
    vocab_size = (151936 if qwen else 50304) if vocab_size is None else vocab_size
    unsupported = _QWEN_UNSUPPORTED if qwen else _UNSUPPORTED
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise OlmoeError(f"{folder}/{_CONFIG}: rotary positions of type {rope}: only the default type can be read")
    for name, disabled in unsupported.items():
        if (config.get(name) or disabled) != disabled:
            raise OlmoeError(f"{folder}/{_CONFIG}: {name} {config[name]!r}: only {disabled!r} can be read")
    names, defaults = (_QWEN_NAMES, _SHARED | _QWEN_DEFAULTS) if qwen else ({}, _SHARED)
    if qwen and "num_experts" in config:  # as transformers 4 writes it
        names = {"intermediate_size": "moe_intermediate_size"}
    fields = {name: config.get(names.get(name, name), default) for name, default in defaults.items()}
    head_dim = config.get("head_dim")
    if qwen:
        fields |= {"qk_norm": "head", "head_dim": head_dim}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    try:
        settings = ModelSettings(**fields, rope_theta=theta)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OlmoeError(f"{folder}/{_CONFIG}: {place or 'settings'}: {first['msg']}") from None
    if head_dim not in (None, settings.head_width):
        raise OlmoeError(f"{folder}/{_CONFIG}: head_dim {config['head_dim']}: only hidden_size / heads can be read")
    return settings, vocab_size


def read_olmoe(folder: Path, dtype: torch.dtype, settings: ModelSettings | None = None) -> Transformer:
    """The model of a folder, weights in float32, in evaluation mode.

    Args:
        dtype: of the matmuls.
        settings: of the model, with the folder's shapes but, for instance, other balancing. Default: the folder's.

    Raises:
        OlmoeError: no such model, or weights that are missing, unknown, of another shape or unreadable; names them.
    """
    folder_settings, vocab_size = read_settings(folder)
    settings = settings or folder_settings
    state = dict(olmoe_weights(folder, settings))
    if settings.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        buffers = dict(Transformer(settings, vocab_size, dtype).named_buffers())
    state |= {name: torch.zeros(buffer.shape) for name, buffer in buffers.items()}  # not in the folder
    return Transformer.from_state(settings, vocab_size, dtype, state)


def olmoe_weights(folder: Path, settings: ModelSettings) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and value in a folder, float32 on the CPU, read one at a time.

    Raises:
        OlmoeError: see `read_olmoe`.
    """
    _, vocab_size = read_settings(folder)
    with torch.device("meta"):
        parameters = dict(Transformer(settings, vocab_size, torch.float32).named_parameters())
    with ExitStack() as stack:
        weights = _Weights(folder, stack)
        for name, parameter in parameters.items():
            yield name, weights.read(name, parameter.shape)
        if settings.tie_word_embeddings:
            weights.unread.discard("lm_head.weight")
        if weights.unread:
            raise OlmoeError(f"{folder}: unknown weight {min(weights.unread)}: OLMoE's architecture has no such weight")


class _Weights:
    """The safetensors of a folder, read tensor by tensor; ``unread`` are the names not read yet."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        try:
            if (folder / _INDEX).is_file():
                index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
                files = sorted(set(index["weight_map"].values()))
            else:
                files = [_WEIGHTS]
            opened = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in files]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise OlmoeError(f"{folder}: its weights cannot be read ({error}): name a complete folder") from None
        self._files: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        # Old versions of transformers saved the rotary frequencies.
        self.unread = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """One tensor of our model, float32; experts are stacked if the files have them one by one."""
        prefix, experts, projection = name.partition(".mlp.experts.")
        if not experts or name in self._files:
            return self._tensor(name, shape).to(torch.float32, copy=True)  # not a view of the file, which may change
        projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
        stacked = torch.empty(shape)
        for expert, weight in enumerate(stacked):
            for target, source in zip(weight.chunk(len(projections)), projections, strict=True):
                target.copy_(self._tensor(f"{prefix}{experts}{expert}.{source}.weight", target.shape))
        return stacked

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise OlmoeError(f"{self._folder}: weight {name} is missing: name a complete folder")
        tensor = file.get_tensor(name)
        if tensor.shape != shape:
            wanted, found = tuple(shape), tuple(tensor.shape)
            raise OlmoeError(
                f"{self._folder}: {name} has shape {found}, but {_CONFIG} or the settings give {wanted}: "
                "name a complete folder, or correct the settings"
            )
        self.unread.discard(name)
        return tensor
