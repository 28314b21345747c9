"""Every setting of a run: typed, defaulted and documented once.

A run is described by a YAML file and ``section.key=value`` overrides. Whatever is wrong with them comes out as one
line that names the file (or the command line), the key and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moetrain.expression import parse_filter


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line naming place, key and remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)


class RunSettings(_Section):
    name: str = Field("run", description="Name of the run: its folder under output_dir. Nothing is ever overwritten.")
    output_dir: str = Field("runs", description="Folder that holds the runs.")
    seed: int = Field(0, ge=0, description="Seed of weights, data order and every sampled choice.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("use letters, digits, '.', '_' and '-' only, beginning with a letter or digit")
        return name


class FactSettings(_Section):
    """What a planted built-in domain states; each setting is taken by the domains that its meaning names."""

    like: Literal["modular", "math", "chemistry"] | None = Field(
        None, description="random_answers: the domain whose form and answers it imitates (default modular)."
    )
    modulus: int | None = Field(
        None, ge=5, le=199, description="modular, random_answers like modular: a prime (default 59)."
    )
    operation: Literal["add", "subtract", "multiply", "divide"] | None = Field(
        None, description="modular, random_answers like modular: what is done modulo the prime (default add)."
    )
    rule: Literal["copy", "reverse", "brackets"] | None = Field(
        None, description="formal: what is asked about a string (default reverse)."
    )
    length: int | None = Field(None, ge=5, le=32, description="formal: symbols of a string (default 6).")
    count: int | None = Field(
        None, ge=2, description="formal, random_answers like math or chemistry: facts, held out or not (default 2000)."
    )
    trained_share: float | None = Field(
        None, gt=0, lt=1, description="All planted domains: share of the facts that is trained (default 0.6)."
    )
    sign: str | None = Field(
        None,
        description="modular (default + - * /), random_answers like modular or math (default @): the sign of the "
        "operation, one character in quotes; domains of one run that would state the same need different ones.",
    )

    @field_validator("modulus")
    @classmethod
    def _prime(cls, modulus: int | None) -> int | None:
        if modulus is not None and any(modulus % divisor == 0 for divisor in range(2, modulus)):
            raise ValueError("the modulus must be a prime such as 59, 97 or 113")
        return modulus

    @field_validator("sign")
    @classmethod
    def _one_sign(cls, sign: str | None) -> str | None:
        if sign is not None and (len(sign) != 1 or sign.isdigit() or sign.isspace() or not sign.isprintable()):
            raise ValueError("the sign is one visible character, no digit")
        return sign

    def given(self) -> dict[str, Any]:
        """The settings that are not null: the options of the built-in domain."""
        return self.model_dump(exclude_none=True)


_FACTS_TAKEN: dict[str, tuple[str, ...]] = {
    "modular": ("modulus", "operation", "trained_share", "sign"),
    "random_answers": ("like", "modulus", "operation", "trained_share", "sign"),
    "random_answers like math": ("like", "count", "trained_share", "sign"),
    "random_answers like chemistry": ("like", "count", "trained_share"),
    "formal": ("rule", "length", "count", "trained_share"),
}


class DomainSettings(_Section):
    """Where one domain's documents come from: exactly one of ``path``, ``builtin`` and ``hub``."""

    path: str | list[str] | None = Field(
        None,
        description="Files or patterns, read by what they end in: .jsonl, .json, .parquet, or plain text and source "
        "code (.txt, .md, .py, ...: a file is a document), also with .gz; a folder is every such file below it. "
        "Relative to data.root.",
    )
    builtin: str | None = Field(
        None,
        description="A built-in domain that needs no files: code, math, commonsense, chemistry; for studies modular, "
        "random_answers, formal.",
    )
    hub: str | None = Field(
        None, description="A data set read through `datasets`: a name on the Hugging Face hub, or a local folder."
    )
    hub_config: str | None = Field(None, description="Which of the hub data set's configurations to read.")
    hub_revision: str | None = Field(None, description="Commit or tag of the hub data set; null takes its newest.")
    split: str = Field("train", description="Split of the hub data set.")
    streaming: bool = Field(
        False,
        description="Read the hub data set as it arrives, without keeping it; twice, unless tokenizer.model is given.",
    )
    text_field: str = Field(
        "text", description="Field of a JSON line, or column of a Parquet file or hub data set, that holds the text."
    )
    filter: str | None = Field(
        None,
        description="Which rows to take, by their fields: names, constants, comparisons, and, or, not, len(), e.g. "
        "language == 'en' and score >= 3.",
    )
    limit: int | None = Field(
        None, ge=1, description="Distinct documents to take, the first ones; null takes all. It is read by one process."
    )
    size: int | None = Field(
        None,
        ge=1,
        description="Bytes of distinct text to take (built-in: to produce, default 4,000,000; a planted domain ends "
        "with its table of facts: see repeats); null takes all.",
    )
    weight: float | None = Field(None, gt=0, description="Share of the stream, with data.mixture: weights.")
    repeats: int = Field(1, ge=1, description="Copies of each document in the stream, each with an id of its own.")
    eps: float | None = Field(
        None,
        gt=0,
        description="Loss in nats at or below which a panel sample counts as memorized while the run goes on; take it "
        "from an earlier run's summary. null: no memorized/fraction.",
    )
    facts: FactSettings | None = Field(None, description="What a planted built-in domain states.")
    shuffled: bool = Field(
        False, description="Whether the tokens of each document stand in a random order, the same one each time."
    )
    panel_tokens: int | None = Field(
        None, ge=1, description="Tokens of a sample that distances compare, for this domain; null takes panel.tokens."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DomainSettings:
        if sum(source is not None for source in (self.path, self.builtin, self.hub)) != 1:
            raise ValueError("give exactly one of path, builtin and hub")
        if self.path == [] or self.path == "" or self.hub == "":
            raise ValueError("path or hub is empty: give a file, a folder, a pattern or a data set")
        if self.builtin is not None and self.filter is not None:
            raise ValueError("filter has no effect on a built-in domain, which has no columns: remove it")
        if self.hub is None:
            for name in ("hub_config", "hub_revision", "split", "streaming"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect without hub: remove it, or give hub")
        return self

    @field_validator("filter")
    @classmethod
    def _parsable(cls, text: str | None) -> str | None:
        if text is not None:
            parse_filter(text)
        return text

    @model_validator(mode="after")
    def _facts_that_are_taken(self) -> DomainSettings:
        given = self.facts.given() if self.facts is not None else {}
        source = f"builtin {self.builtin}" if self.builtin is not None else "path" if self.path is not None else "hub"
        kind = f"{self.builtin} like {given.get('like')}"
        taken = _FACTS_TAKEN.get(kind, _FACTS_TAKEN.get(self.builtin or "", ()))
        if kind in _FACTS_TAKEN:
            source = f"builtin {kind}"
        if unused := [key for key in given if key not in taken]:
            takes = f"facts.{', facts.'.join(taken)}" if taken else "no facts"
            raise ValueError(f"facts.{unused[0]} has no effect with {source}: remove it ({source} takes {takes})")
        return self


class MixturePhase(_Section):
    """A later part of the stream with weights of its own, such as an annealing phase."""

    from_tokens: int = Field(ge=1, description="Tokens of the stream, marks included, after which it begins.")
    weights: dict[str, float] = Field(description="Weight by domain; a domain that is not named is left out.")


class DataSettings(_Section):
    domains: dict[str, DomainSettings] = Field(
        default_factory=dict, description="The domains by name, each with its source (data.domains.NAME.KEY)."
    )
    root: str = Field("", description="Folder that relative paths of domains start from; environment variables expand.")
    cache_dir: str = Field(
        "~/.cache/moetrain", description="Where tokenizers and token files are kept, found again by content hash."
    )
    seq_len: int = Field(512, ge=8, description="Tokens in a packed row; a sample is at most this long.")
    mixture: Literal["by_size", "weights"] = Field(
        "by_size", description="by_size: every document once. weights: by each domain's weight, no document twice."
    )
    phases: list[MixturePhase] = Field(
        default_factory=list,
        description="With mixture: weights: a list of {from_tokens, weights: {DOMAIN: WEIGHT}}, each from there on.",
    )
    heldout_share: float = Field(
        0.01, gt=0, lt=0.5, description="Share of documents held out of training, chosen by a hash of their content."
    )
    max_bad_share: float = Field(
        0.001, ge=0, le=1, description="Share of a domain's lines or rows that may be unusable before it is an error."
    )
    workers: int | None = Field(
        None, ge=1, description="Processes that prepare the data; null: one a CPU core, or one where there is little."
    )
    pack_window: int = Field(4096, ge=1, description="Samples that best-fit packing looks at together.")

    @field_validator("domains")
    @classmethod
    def _plain_domains(cls, domains: dict[str, DomainSettings]) -> dict[str, DomainSettings]:
        for name in domains:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"domain name {name!r}: use letters, digits, '_' and '-' only, it becomes part of tags"
                )
        return domains

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> DataSettings:
        if self.phases and self.mixture != "weights":
            raise ValueError("phases have no effect with by_size: set data.mixture=weights and each domain's weight")
        starts = [phase.from_tokens for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases begin at {starts} tokens: put them in growing order")
        for number, phase in enumerate(self.phases):
            unknown = [name for name in phase.weights if name not in self.domains]
            if unknown:
                near = difflib.get_close_matches(unknown[0], list(self.domains), n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ""
                raise ValueError(f"phases.{number}.weights: no domain {unknown[0]!r}{hint}")
            if any(weight < 0 for weight in phase.weights.values()) or not any(phase.weights.values()):
                raise ValueError(f"phases.{number}.weights: none may be negative, and one has to be above 0")
        return self

    @model_validator(mode="after")
    def _weights(self) -> DataSettings:
        missing = [name for name, domain in self.domains.items() if domain.weight is None]
        if self.mixture == "weights" and missing:
            raise ValueError(f"mixture: weights needs data.domains.{missing[0]}.weight")
        given = [name for name, domain in self.domains.items() if domain.weight is not None]
        if self.mixture == "by_size" and given:
            raise ValueError(f"data.domains.{given[0]}.weight has no effect with by_size: set data.mixture=weights")
        return self


class TokenizerSettings(_Section):
    model: str | None = Field(
        None, description="A SentencePiece .model or a tokenizer.json to use; null trains one on the corpus."
    )
    begin_token: str | None = Field(
        None, description="Mark before a document, of a tokenizer.json; null: what its files or common names say."
    )
    end_token: str | None = Field(None, description="Mark after a document, of a tokenizer.json; null: likewise.")
    vocab_size: int = Field(4096, ge=300, le=2**31 - 1, description="Size of the vocabulary that is trained.")
    sample_bytes: int = Field(
        20_000_000, ge=1000, description="Bytes of text, spread evenly over the domains, that it is trained on."
    )

    @model_validator(mode="after")
    def _marks(self) -> TokenizerSettings:
        if (self.begin_token or self.end_token) and not (self.model or "").endswith(".json"):
            raise ValueError("begin_token and end_token are for a tokenizer.json: set tokenizer.model to one")
        return self


class ModelSettings(_Section):
    """OLMoE's architecture under transformers' names."""

    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    num_hidden_layers: int = Field(6, ge=1, description="Number of layers.")
    num_attention_heads: int = Field(4, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="Key and value heads; null: as many as query heads."
    )
    intermediate_size: int = Field(128, ge=1, description="Width of one expert.")
    num_experts: int = Field(16, ge=1, description="Experts a layer.")
    num_experts_per_tok: int = Field(4, ge=1, description="Experts a token is sent to (top k).")
    num_shared_experts: int = Field(0, ge=0, description="Experts every token goes through beside its top k.")
    norm_topk_prob: bool = Field(False, description="Whether the top-k weights are scaled to sum to one.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    tie_word_embeddings: bool = Field(False, description="Whether input and output embeddings are one matrix.")
    experts: Literal["auto", "grouped_mm", "loop", "dense"] = Field(
        "auto", description="Backend of the experts; dense is the twin of equal active size, without a router."
    )
    attention: Literal["auto", "sdpa", "batched", "reference"] = Field(
        "auto", description="Backend of attention; every one keeps samples apart. auto: batched on CPU, else sdpa."
    )
    balancing: Literal["aux", "bias", "none"] = Field(
        "aux", description="Load balancing: auxiliary loss, loss-free bias on the selection, or none."
    )
    balance_scope: Literal["micro_batch", "global"] = Field(
        "global", description="Tokens over which expert load is counted for balancing: one micro-batch, or the step's."
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss (balancing: aux).")
    router_z_loss_coef: float = Field(0.001, ge=0, description="Weight of the router's z loss.")
    bias_update_rate: float = Field(0.001, ge=0, description="Step of the selection bias (balancing: bias).")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @model_validator(mode="after")
    def _shapes(self) -> ModelSettings:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads} (rotary halves each head)"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}: lower it"
            )
        return self


class OptimSettings(_Section):
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate as a share of the peak.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine decay; warm-up, stable, then linear decay; or constant."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up.")
    decay_share: float = Field(0.2, gt=0, le=1, description="Last share of the run that wsd decays over.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; norms and embeddings have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient; larger ones are scaled down to it.")


class TrainSettings(_Section):
    max_steps: int | None = Field(None, ge=1, description="Steps to train; null trains the whole stream once.")
    batch_rows: int = Field(16, ge=1, description="Rows of a step over all processes: the global batch.")
    micro_batch_rows: int | None = Field(
        None, ge=1, description="Rows of one forward pass; null takes the process's whole share of the batch."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute precision; auto takes bf16 where the hardware is fast at it. Weights stay fp32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute each layer in backward to save memory.")
    deterministic: bool | None = Field(
        None, description="Same hardware, same bits; null: on for CPU, off for CUDA, where it costs speed."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a process; null shares the machine's cores among its processes."
    )
    resume: str = Field(
        "auto",
        description="auto: continue the newest unfinished run of this name with the same settings, else start NAME-2; "
        "never: always a new name; or the path of a checkpoint.",
    )
    log_every: int = Field(10, ge=1, description="Steps between points of the training curves.")
    eval_every: int = Field(250, ge=1, description="Steps between readings of the validation loss; also at the end.")
    eval_tokens: int = Field(32_768, ge=1, description="Held-out tokens read by domain at each of them.")
    checkpoint_every: int | None = Field(1000, ge=1, description="Steps between checkpoints; null: only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that are kept.")

    @model_validator(mode="after")
    def _batch(self) -> TrainSettings:
        if self.micro_batch_rows is not None and self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} must be a multiple of micro_batch_rows {self.micro_batch_rows}"
            )
        return self


class PanelSettings(_Section):
    samples: int = Field(64, ge=2, description="Panel samples in each of a domain's three cells.")
    readings: int = Field(20, ge=2, description="Readings of the panel in a run, evenly spaced, step 0 included.")
    linear_kernel: bool = Field(
        False, description="Whether each layer's inputs are stored too, for kernel/d_eff_linear: 2 bytes a feature."
    )
    tokens: int = Field(64, ge=1, description="First tokens of a sample that routing distances compare.")


class ProbeSettings(_Section):
    tasks: list[str] = Field(
        default_factory=list,
        description="Files or patterns of probe items (.jsonl, also .gz; an item has domain, task, id, prompt, sep, "
        "and choices with answer, or target). Relative to data.root.",
    )
    contaminated: Literal["exclude", "keep"] = Field(
        "exclude",
        description="Items found in training text (13 words of prompt and answer in a row, or all of 4 to 12) are "
        "counted and listed; exclude also leaves them out of the probes.",
    )


class MonitorSettings(_Section):
    enabled: bool = Field(True, description="Whether routing is recorded by sample.")
    every: int = Field(50, ge=1, description="Steps between readings of the streaming metrics.")
    window: int = Field(64, ge=2, description="Newest samples of a domain that the streaming metrics are taken over.")
    tau: float = Field(0.7, gt=0, lt=1, description="Share of routing weight that a pathway keeps in each layer.")


class PhaseSettings(_Section):
    """Thresholds of the phase rule, see `moetrain.grokking.phase`: provisional until a study has calibrated them."""

    window: int = Field(5, ge=3, description="Readings that a trend, a mean and a wait are made of.")
    samples: int = Field(64, ge=2, description="Seen panel samples below which nothing is said.")
    learned: float = Field(0.1, ge=0, description="Share of its highest reading that the loss must have fallen by.")
    steep: float = Field(
        0.05, ge=0, description="Fall over a window, of the fall so far, from which on it is learning."
    )
    rank_fall: float = Field(0.15, ge=0, description="Relative fall of effective rank that speaks for generalizing.")
    cka_rise: float = Field(0.02, ge=0, description="Rise of layer CKA that speaks for generalizing.")
    spread_fall: float = Field(0.5, ge=0, description="Relative fall of spread that speaks for generalizing.")
    cosine_rise: float = Field(0.05, ge=0, description="Rise of the mean cosine that speaks for generalizing.")
    agree: int = Field(3, ge=1, le=4, description="Of the four measures that have to speak for generalizing.")
    entropy_rise: float = Field(
        0.1, ge=0, description="Relative rise of router entropy that explains spread and cosine."
    )
    load_rise: float = Field(0.3, ge=0, description="Relative rise of load variation that explains every measure.")
    flat: float = Field(0.2, ge=0, description="Change over a window, of the total, up to which a measure has settled.")


class Settings(_Section):
    """All settings of a run."""

    run: RunSettings = Field(default_factory=RunSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    monitor: MonitorSettings = Field(default_factory=MonitorSettings)
    panel: PanelSettings = Field(default_factory=PanelSettings)
    phase: PhaseSettings = Field(default_factory=PhaseSettings)
    probes: ProbeSettings = Field(default_factory=ProbeSettings)

    def panel_tokens(self, domain: str) -> int:
        """Text tokens of a sample of this domain that distances compare."""
        return self.data.domains[domain].panel_tokens or self.panel.tokens

    @model_validator(mode="after")
    def _across_sections(self) -> Settings:
        for name in self.data.domains:
            if self.panel_tokens(name) > self.data.seq_len - 2:
                raise ValueError(
                    f"panel tokens of {name} ({self.panel_tokens(name)}) exceed data.seq_len - 2 "
                    f"({self.data.seq_len - 2}): lower panel.tokens or data.domains.{name}.panel_tokens"
                )
        return self

    def to_yaml(self) -> str:
        """The resolved settings as YAML that `load_settings` reads back to the same values."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file (none: all defaults) with ``section.key=value`` overrides laid over it.

    Raises:
        SettingsError: an unreadable file, an unknown key, a wrong type or an impossible combination, in one line.
    """
    place = str(path) if path is not None else "settings"
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    origin: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = _parse_override(override)
        _lay_over(tree, keys, value, override)
        origin[keys] = f"command line {override!r}"
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_one_line(error, place, origin)) from None
    if not settings.data.domains:
        raise SettingsError(
            f"{place}: data.domains is empty: name at least one domain, e.g. data.domains.code.builtin=code"
        )
    return settings


def expand(path: str, key: str) -> str:
    """A path with ``~`` and environment variables filled in.

    Raises:
        SettingsError: a variable that is not set, naming the setting ``key`` it stands in.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise SettingsError(f"{key}: environment variable {unset[1]} is not set: set it, or override {key}=FOLDER")
    return expanded


def describe_settings() -> Iterator[tuple[str, str, str, str]]:
    """Each setting as (dotted key, type, default, meaning), in order, for ``--help``."""
    yield from _describe(Settings, "")


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = prefix + name
        if section_type := _section_type(field.annotation):
            yield from _describe(section_type, key + ".")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
        yield key, _type_name(field.annotation), shown, field.description or ""
        if name == "domains":
            yield from _describe(DomainSettings, key + ".NAME.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, also where it may be null."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part if annotation is part or type(None) in get_args(annotation) else None
    return None


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    choices = re.fullmatch(r"(typing\.Optional\[)?typing\.Literal\[(.*?)\]+", text)
    if choices:
        names = [choice.strip(" '") for choice in choices[2].split(",")]
        return " | ".join([*names, "null"] if choices[1] else names)
    return re.sub(r"(\w+\.)+", "", text).replace("None", "null")


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
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: holds a {type(tree).__name__}, not sections of settings such as 'model:'")
    return tree


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys) or len(keys) < 2:
        raise SettingsError(f"command line {override!r}: write section.key=value, e.g. train.max_steps=100")
    try:
        return keys, yaml.safe_load(text)
    except yaml.YAMLError:
        if text[:1] in "[{'\"":
            raise SettingsError(
                f"command line {override!r}: the value is not valid YAML: close what it opens"
            ) from None
        return keys, text  # a pattern such as *.jsonl is an alias to YAML, and text to us


def _lay_over(tree: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        node = tree.setdefault(key, {})
        if node is None:
            node = tree[key] = {}
        if not isinstance(node, dict):
            raise SettingsError(f"command line {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        tree = node
    tree[keys[-1]] = value


def _one_line(error: ValidationError, place: str, origin: Mapping[tuple[str, ...], str]) -> str:
    first = error.errors()[0]
    keys = tuple(str(part) for part in first["loc"])
    # A union (path: text or list) adds the tried branch to the location: keep what names a setting.
    while keys and not _is_setting(keys) and first["type"] != "extra_forbidden":
        keys = keys[:-1]
    key = ".".join(keys)
    where = next((text for laid, text in origin.items() if laid == keys), place)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = [name for name, *_ in describe_settings()] + list(Settings.model_fields)
        near = _nearest(keys, known)
        remedy = f"did you mean {near}?" if near else "--help lists every setting"
        return f"{where}: {key}: unknown key: {remedy}{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool | type(None)) and keys else ""
    return f"{where}: {key + ': ' if key else ''}{message}{shown}{more}"


def _is_setting(keys: tuple[str, ...]) -> bool:
    dotted = ".".join(keys)
    if len(keys) >= 3 and keys[:2] == ("data", "domains"):
        fact = len(keys) == 5 and keys[3] == "facts" and keys[4] in FactSettings.model_fields
        return len(keys) == 3 or (len(keys) == 4 and keys[3] in DomainSettings.model_fields) or fact
    return dotted in Settings.model_fields or any(name == dotted for name, *_ in describe_settings())


def _nearest(keys: tuple[str, ...], known: Sequence[str]) -> str | None:
    """The known key closest in spelling: in the same section first, then the same last word anywhere."""
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
    return same_word[0] if same_word else next(iter(difflib.get_close_matches(dotted, known, n=1)), None)
