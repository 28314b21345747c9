"""All settings of a run: loaded from YAML, overridden, checked and described.

A run is described by a YAML file and ``section.key=value`` overrides. Every error is one line with the place (file or
command line), the key and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from moetrain.config.base import Section
from moetrain.config.data import DataSettings, DomainSettings, TokenizerSettings
from moetrain.config.facts import FactSettings
from moetrain.config.monitoring import MonitorSettings, PanelSettings, PhaseSettings, ProbeSettings, ProfileSettings
from moetrain.config.training import RUN_NAME, GuardSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

_MAX_SHOWN = 200  # characters of a value in a message


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line with place, key and remedy."""


class Settings(Section):
    """All settings of a run."""

    run: RunSettings = Field(default_factory=RunSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    guard: GuardSettings = Field(default_factory=GuardSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    panel: PanelSettings = Field(default_factory=PanelSettings)
    phase: PhaseSettings = Field(default_factory=PhaseSettings)
    probes: ProbeSettings = Field(default_factory=ProbeSettings)
    profile: ProfileSettings = Field(default_factory=ProfileSettings)

    @property
    def watches_routing(self) -> bool:
        """Whether the monitor is enabled and the model has experts, routed or blocks of a dense model."""
        return self.monitor.enabled and self.model.recorded_experts > 0

    def panel_tokens(self, domain: str) -> int:
        """Text tokens at the start of this domain's samples over which routing is compared."""
        return self.data.domains[domain].panel_tokens or self.panel.tokens

    @model_validator(mode="after")
    def _across_sections(self) -> Settings:
        for name in self.data.domains:
            if self.panel_tokens(name) > self.data.seq_len - 2:
                raise ValueError(
                    f"panel tokens of {name} ({self.panel_tokens(name)}) exceed data.seq_len - 2 "
                    f"({self.data.seq_len - 2}): lower panel.tokens or data.domains.{name}.panel_tokens"
                )
        tokenized = [name for name, domain in self.data.domains.items() if domain.tokens is not None]
        if tokenized and self.tokenizer.model is None:
            raise ValueError(
                f"data.domains.{tokenized[0]}.tokens: set tokenizer.model to the tokenizer that made these token ids"
            )
        if self.tokenizer.pad_to > 1 and self.model.initialize_from is not None:
            raise ValueError(
                "tokenizer.pad_to has no effect with model.initialize_from, whose embeddings are taken as they are: "
                "remove it"
            )
        if self.model.experts == "dense" and self.monitor.weights != "softmax":
            raise ValueError(f"monitor.weights {self.monitor.weights} needs a router: set softmax for a dense model")
        auto = [name for name, domain in self.data.domains.items() if domain.repeats == "auto"]
        if auto and not (self.watches_routing and self.panel.repeat_every):
            raise ValueError(
                f"data.domains.{auto[0]}.repeats: auto needs the monitor, a model with routers or "
                "model.dense_experts, and panel.repeat_every above 0: give a number of repeats, or restore them"
            )
        if (ranks := self.train.expert_parallel) > 1:
            if self.model.experts == "dense":
                raise ValueError(
                    f"train.expert_parallel {ranks} has no effect on the dense twin, which has no experts: set it to 1"
                )
            if self.model.num_experts % ranks:
                raise ValueError(
                    f"model.num_experts {self.model.num_experts} does not split over train.expert_parallel {ranks} "
                    "ranks: make it a multiple, or lower train.expert_parallel"
                )
        return self

    def to_yaml(self) -> str:
        """The resolved settings as YAML; `load_settings` reads them back unchanged."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def by_key(self) -> dict[str, Any]:
        """The resolved settings by dotted key, ``section.key``."""
        return {key: value for key, value in flatten(self.model_dump()).items() if value != {}}


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file (None: all defaults) and ``section.key=value`` overrides.

    Raises:
        SettingsError: an unreadable file, an unknown key, a wrong type or an invalid combination.
    """
    place = str(path) if path is not None else "settings"
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
        _drop_former_rule(tree, place)
        _name_after_file(tree, Path(path).stem)
    origin: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        _apply_override(tree, keys, value, override)
        origin[keys] = f"command line {_shown(override)}"
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_printable(_one_line(error, place, origin))) from None
    if not settings.data.domains:
        raise SettingsError(
            f"{place}: data.domains is empty: name at least one domain, e.g. data.domains.code.builtin=code"
        )
    return settings


def expand(path: str, key: str) -> str:
    """A path with ``~`` and environment variables expanded.

    Args:
        key: name of the setting, for the message.

    Raises:
        SettingsError: an environment variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise SettingsError(f"{key}: environment variable {unset[1]} is not set: set it, or override {key}=FOLDER")
    return expanded


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by dotted key; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        found |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


class SettingDescription(NamedTuple):
    key: str  # dotted
    type_name: str
    default: str
    description: str


def describe_settings() -> Iterator[SettingDescription]:
    """All settings in order, for ``--help``."""
    yield from _describe(Settings, "")


def _describe(section: type[BaseModel], prefix: str) -> Iterator[SettingDescription]:
    for name, field in section.model_fields.items():
        key = prefix + name
        if section_type := _section_type(field.annotation):
            yield from _describe(section_type, key + ".")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        yield SettingDescription(key, _type_name(field.annotation), shown, field.description or "")
        if name == "domains":
            yield from _describe(DomainSettings, key + ".NAME.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class of a setting that is a section, or a section or null; else None."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part if annotation is part or type(None) in get_args(annotation) else None
    return None


def _type_name(annotation: Any) -> str:
    """A type as ``--help`` shows it: alternatives separated by |, None as null, without constraints."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    return "null" if annotation is type(None) else annotation.__name__


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = difflib.get_close_matches(str(path), near, n=1, cutoff=0.3)
        remedy = f"did you mean {hint[0]}?" if hint else "give the path of a YAML file"
        raise SettingsError(f"{path}: no such configuration: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}): give a UTF-8 YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SettingsError(f"{path}{line}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # an impossible date, too many digits, too deep nesting
        raise SettingsError(f"{path}: a value cannot be read ({error}): put text in quotes") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: holds a {type(tree).__name__}, not sections of settings such as 'model:'")
    return tree


_FORMER_RULE = {"samples", "answers", "generalizing", "memorizing", "still"}
"""Thresholds of a former phase rule, which rested on leave-one-out accuracy."""


def _drop_former_rule(tree: dict[str, Any], place: str) -> None:
    """Leave out the thresholds of the former phase rule, so that runs made with it can be opened."""
    phase = tree.get("phase")
    if isinstance(phase, dict) and _FORMER_RULE & phase.keys():
        warnings.warn(
            f"{place}: its section phase is left out: {', '.join(sorted(_FORMER_RULE & phase.keys()))} belong to a "
            "former rule of the phase; remove the section",
            stacklevel=3,
        )
        del tree["phase"]


def _name_after_file(tree: dict[str, Any], stem: str) -> None:
    """Name a run without a name after its configuration file, if that is a valid name."""
    run = tree.get("run")
    if re.fullmatch(RUN_NAME, stem) and (run is None or (isinstance(run, dict) and "name" not in run)):
        tree["run"] = {**(run or {}), "name": stem}


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys) or len(keys) < 2:
        raise SettingsError(f"command line {_shown(override)}: write section.key=value, e.g. train.max_steps=100")
    try:
        return keys, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        if text[:1] in "[{'\"":
            raise SettingsError(
                f"command line {_shown(override)}: the value is not valid YAML: close brackets and quotes"
            ) from None
        return keys, text  # for instance *.jsonl, which YAML takes for an alias


def _apply_override(tree: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        node = tree.setdefault(key, {})
        if node is None:
            node = tree[key] = {}
        if not isinstance(node, dict):
            raise SettingsError(
                f"command line {_shown(override)}: {'.'.join(keys[: depth + 1])} is a value, not a section"
            )
        tree = node
    tree[keys[-1]] = value


def _shown(value: Any) -> str:
    """A value as quoted in messages, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _printable(line: str) -> str:
    """A line with unprintable characters escaped, which keys of a YAML file may hold."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def _one_line(error: ValidationError, place: str, origin: Mapping[tuple[str, ...], str]) -> str:
    by_setting: dict[tuple[str, ...], list[ErrorDetails]] = {}  # a union of types has an error for each of them
    for each in error.errors():
        by_setting.setdefault(_setting_of(each), []).append(each)
    keys, (first, *others) = next(iter(by_setting.items()))
    key = ".".join(keys)
    unknown = first["type"] == "extra_forbidden"  # an unknown section is the first part of an override's key
    set_by = (text for each, text in origin.items() if each == keys or (unknown and each[: len(keys)] == keys))
    where = next(set_by, place)
    more = f" (and {len(by_setting) - 1} more)" if len(by_setting) > 1 else ""
    if unknown:
        known = [setting.key for setting in describe_settings()] + list(Settings.model_fields)
        near = _nearest(keys, known)
        remedy = f"did you mean {near}?" if near else "--help lists every setting"
        return f"{where}: {key}: unknown key: {remedy}{more}"
    message, given = first["msg"].removeprefix("Value error, "), first.get("input")
    message += "".join(f", or {each['ctx']['expected']}" for each in others if each["type"] == "literal_error")
    shown = f" (given {_shown(given)})" if isinstance(given, str | int | float | bool | type(None)) and keys else ""
    return f"{where}: {key + ': ' if key else ''}{message}{shown}{_nearest_word(first, others)}{more}"


def _setting_of(error: ErrorDetails) -> tuple[str, ...]:
    """The key of the setting that an error is about; pydantic adds the branch of a union, or the place in a list."""
    keys = tuple(str(part) for part in error["loc"])
    while keys and not _is_setting(keys) and error["type"] != "extra_forbidden":
        keys = keys[:-1]
    return keys


def _nearest_word(first: ErrorDetails, others: Sequence[ErrorDetails]) -> str:
    """Of a setting that takes certain words, the one that is most like the given one; empty where none is."""
    given = str(first["input"])
    expected = [each["ctx"]["expected"] for each in (first, *others) if each["type"] == "literal_error"]
    words = {word.lower(): word for text in expected for word in re.findall(r"'(\w+)'", text)}
    near = difflib.get_close_matches(given.lower(), list(words), n=1)
    return f": did you mean {words[near[0]]}?" if near else ""


# Names of settings in other trainers.
_OTHER_NAMES = {
    **dict.fromkeys(("lr", "max_lr"), "optim.learning_rate"),
    **dict.fromkeys(("warmup", "lr_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(("clip_grad", "max_grad_norm", "max_norm"), "optim.grad_clip"),
    **dict.fromkeys(("steps", "training_steps", "train_iters", "max_duration"), "train.max_steps"),
    **dict.fromkeys(("batch_size", "global_batch_size"), "train.batch_rows"),
    **dict.fromkeys(("micro_batch_size", "local_batch_size"), "train.micro_batch_rows"),
    **dict.fromkeys(("seq_length", "sequence_length", "max_seq_len", "context_length"), "data.seq_len"),
    **dict.fromkeys(("top_k", "topk", "moe_top_k"), "model.num_experts_per_tok"),
    **dict.fromkeys(("moe_num_experts", "experts_count"), "model.num_experts"),
    **dict.fromkeys(("layers", "n_layers", "num_layers"), "model.num_hidden_layers"),
    **dict.fromkeys(("ep", "ep_size", "expert_model_parallel_size"), "train.expert_parallel"),
    **dict.fromkeys(("heads", "n_heads", "num_heads"), "model.num_attention_heads"),
    **dict.fromkeys(("dim", "d_model", "n_embd"), "model.hidden_size"),
    **dict.fromkeys(("ffn_hidden_size", "moe_intermediate_size", "ffn_dim"), "model.intermediate_size"),
}


def _is_setting(keys: tuple[str, ...]) -> bool:
    dotted = ".".join(keys)
    if len(keys) >= 3 and keys[:2] == ("data", "domains"):
        fact = len(keys) == 5 and keys[3] == "facts" and keys[4] in FactSettings.model_fields
        return len(keys) == 3 or (len(keys) == 4 and keys[3] in DomainSettings.model_fields) or fact
    return dotted in Settings.model_fields or any(setting.key == dotted for setting in describe_settings())


def _nearest(keys: tuple[str, ...], known: Sequence[str]) -> str | None:
    """The known key that an unknown one most likely means: by spelling, last word, or its name in other trainers."""
    dotted = ".".join(keys)
    if len(keys) in (4, 5) and keys[:2] == ("data", "domains"):
        fields = DomainSettings.model_fields if len(keys) == 4 else FactSettings.model_fields
        near = difflib.get_close_matches(keys[-1], list(fields), n=1)
        return ".".join((*keys[:-1], near[0])) if near else None
    section = [name for name in known if name.rpartition(".")[0] == dotted.rpartition(".")[0]]
    near = difflib.get_close_matches(dotted, section, n=1, cutoff=0.75)
    if near:
        return near[0]
    same_word = [name for name in known if name.rpartition(".")[2] == keys[-1]]
    if same_word:
        return same_word[0]
    if keys[-1] in _OTHER_NAMES:
        return _OTHER_NAMES[keys[-1]]
    settings = [name for name in known if "." in name] if len(keys) > 1 else known
    return next(iter(difflib.get_close_matches(dotted, settings, n=1)), None)
