"""Our weights as a folder that transformers' `OlmoeForCausalLM` loads, and such a folder as our model.

On disk every expert stands alone (``mlp.experts.7.gate_proj.weight``), which transformers 4 and 5 both read; ours stand
stacked, gate above up, as transformers 5 holds them in memory. A dense model goes as an OLMoE of one expert, whose
routing weight is 1 whatever its router says.

Shapes: E experts, F width of an expert, D hidden size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moetrain.config import ModelSettings
from moetrain.models.transformer import Transformer

SHARD_BYTES = 5_000_000_000
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# What transformers' config calls by the same name, and its default where a file leaves it out.
_SHARED = {
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
# Options of its config that our model has no counterpart for, and the value that asks for none.
_ABSENT = {"clip_qkv": None, "attention_bias": False, "hidden_act": "silu"}


class OlmoeError(ValueError):
    """A model that cannot be written as transformers' OLMoE, or a folder that holds none; one line."""


def olmoe_config(
    settings: ModelSettings, vocab_size: int, longest: int, begin: int, end: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The ``config.json`` of a model.

    Args:
        longest: tokens of the longest sample it was trained on.
        begin, end: ids of the tokenizer's marks.
        dtype: type of the weights on disk.

    Raises:
        OlmoeError: a setting that transformers' OLMoE has nothing for, by name.
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
    config = {name: getattr(settings, name) for name in _SHARED} | {"num_key_value_heads": settings.key_value_heads}
    if settings.experts == "dense":
        width = settings.num_experts_per_tok * settings.intermediate_size
        config |= {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": width, "norm_topk_prob": False}
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **config,
        **_ABSENT,
        "attention_dropout": 0.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": longest,
        "rope_theta": settings.rope_theta,
        "rope_scaling": None,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": None,  # its default would keep token 1 from being trained
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a model's weights as safetensors under transformers' names; returns the files, of ``shard_bytes`` each.

    A shard at a time is copied, so that a large model needs little more memory than its own.

    Raises:
        OSError: they could not be written.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in _on_disk(model):
        bytes_ = tensor.numel() * dtype.itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_
        total += bytes_
    count = len(shards)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [_WEIGHTS]
    for file, shard in zip(names, shards, strict=True):
        copies = {name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in shard.items()}
        path = folder / file
        path.touch()
        mode = path.stat().st_mode  # safetensors lets nobody else read what it writes
        try:
            save_file(copies, path, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps what the system said, a full disk among it
            raise OSError(f"{path} could not be written: {error}") from None
        path.chmod(mode)
    if count > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _on_disk(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the files, by name: views of the model's own."""
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        layer, _, part = name.partition(".mlp.")
        if name == "lm_head.weight" and model.settings.tie_word_embeddings:
            continue
        if part.startswith("gate_up_proj"):  # the dense twin's
            yield f"{layer}.mlp.gate.weight", tensor.new_zeros(1, tensor.shape[1])
        if part.startswith(("experts.gate_up_proj", "gate_up_proj")):
            for expert, gate_up in enumerate(tensor.view(-1, *tensor.shape[-2:])):
                gate, up = gate_up.chunk(2)
                yield f"{layer}.mlp.experts.{expert}.gate_proj.weight", gate
                yield f"{layer}.mlp.experts.{expert}.up_proj.weight", up
        elif part.startswith(("experts.down_proj", "down_proj")):
            for expert, down in enumerate(tensor.view(-1, *tensor.shape[-2:])):
                yield f"{layer}.mlp.experts.{expert}.down_proj.weight", down
        else:
            yield name, tensor


def find_olmoe(name: str, weights: bool = True) -> Path:
    """The folder of a transformers model: a local one, or a snapshot of the hub's ``OWNER/NAME[@REVISION]``.

    Args:
        weights: whether a snapshot needs more than configuration and tokenizer.

    Raises:
        OlmoeError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if repository is None or name.startswith((".", "/", "~")):
        raise OlmoeError(f"{name}: no such folder: give one, or OWNER/NAME or OWNER/NAME@REVISION of the hub")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(repository[1], revision=repository[2], allow_patterns=wanted))
    except Exception as error:  # the package and its transport raise many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OlmoeError(f"{name}: no such folder, and the hub does not give it: {reason}") from None


def read_settings(folder: Path) -> tuple[ModelSettings, int]:
    """The model settings that a folder's ``config.json`` stands for, and its vocabulary's size.

    Raises:
        OlmoeError: no config.json, another architecture, or one with what our model cannot do, by name.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind, vocab_size = config.get("model_type"), config.get("vocab_size", 50304)
    except (OSError, ValueError, AttributeError) as error:
        raise OlmoeError(f"{folder}: no transformers model here ({_CONFIG}: {error})") from None
    if kind != "olmoe":
        raise OlmoeError(f"{folder}: its {_CONFIG} says model_type {kind!r}: only 'olmoe' can be read")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise OlmoeError(f"{folder}: rotary positions of type {rope}: only the default type can be read")
    for name, none in _ABSENT.items():
        if config.get(name, none) != none:
            raise OlmoeError(f"{folder}: its {_CONFIG} says {name} {config[name]!r}: only {none!r} can be read")
    fields = {name: config.get(name, default) for name, default in _SHARED.items()}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    try:
        settings = ModelSettings(**fields, rope_theta=theta)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OlmoeError(f"{folder}: its {_CONFIG} cannot be read: {place or _CONFIG}: {first['msg']}") from None
    if config.get("head_dim") not in (None, settings.hidden_size // settings.num_attention_heads):
        raise OlmoeError(
            f"{folder}: its {_CONFIG} says head_dim {config['head_dim']}: only hidden_size / heads is read"
        )
    return settings, vocab_size


def read_olmoe(folder: Path, dtype: torch.dtype, settings: ModelSettings | None = None) -> Transformer:
    """The model of a folder, weights in float32, in evaluation mode.

    Args:
        dtype: what products run in.
        settings: a model of the same shapes to put the weights into, for instance with other balancing; null: the
            folder's own.

    Raises:
        OlmoeError: no such model, or weights that are missing, unknown, of another shape or unreadable, by name.
    """
    own, vocab_size = read_settings(folder)
    settings = settings or own
    with torch.device("meta"):
        shapes = Transformer(settings, vocab_size, dtype).state_dict()
    with ExitStack() as stack:
        weights = _Weights(folder, stack)
        if settings.tie_word_embeddings:
            weights.left.discard("lm_head.weight")  # the input's again
        state = {name: weights.take(name, shape.shape) for name, shape in shapes.items() if not _is_new(name, settings)}
        if weights.left:
            raise OlmoeError(f"{folder}: holds {min(weights.left)}, which OLMoE's architecture has no place for")
    if settings.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # A selection bias starts at zero.
    state |= {name: torch.zeros(shape.shape) for name, shape in shapes.items() if name not in state}
    return Transformer.from_state(settings, vocab_size, dtype, state)


def _is_new(name: str, settings: ModelSettings) -> bool:
    """Whether a tensor of ours has no counterpart in a folder."""
    return name.endswith("selection_bias") or (name == "lm_head.weight" and settings.tie_word_embeddings)


class _Weights:
    """The safetensors of a folder, read tensor by tensor; ``left`` are the names not taken yet."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        try:
            if (folder / _INDEX).is_file():
                places: Mapping[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(places.values()))
            else:
                files = [_WEIGHTS]
            opened = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in files]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise OlmoeError(
                f"{folder}: its weights cannot be read ({error}): give a folder with whole {_WEIGHTS} or their shards"
            ) from None
        self._files: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        # Frequencies, which old versions saved, follow from the settings.
        self.left = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}

    def take(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor of ours, float32, put together from the files' where they keep experts apart."""
        *_, part = name.partition(".mlp.experts.")
        if not part or name in self._files:
            return self._read(name, shape).to(torch.float32, copy=True)  # not a view of the file: that may change
        stacked = torch.empty(shape)
        for expert, into in enumerate(stacked):
            stem = f"{name.removesuffix(part)}{expert}"
            if part == "down_proj":
                into.copy_(self._read(f"{stem}.down_proj.weight", into.shape))
                continue
            for half, which in zip(into.chunk(2), ("gate_proj", "up_proj"), strict=True):
                half.copy_(self._read(f"{stem}.{which}.weight", half.shape))
        return stacked

    def _read(self, name: str, shape: torch.Size) -> torch.Tensor:
        file = self._files.get(name)
        if file is None:
            raise OlmoeError(f"{self._folder}: its weights lack {name}")
        tensor = file.get_tensor(name)
        if tensor.shape != shape:
            wanted, found = tuple(shape), tuple(tensor.shape)
            raise OlmoeError(f"{self._folder}: {name} is {found}, its {_CONFIG} or the settings make it {wanted}")
        self.left.discard(name)
        return tensor
