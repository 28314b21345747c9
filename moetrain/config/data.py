"""Settings of the data: domains and their sources, mixture, packing, tokenizer."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.base import Section
from moetrain.config.facts import FACT_OPTIONS, FactSettings
from moetrain.expression import parse_filter


class DomainSettings(Section):
    """Source of a domain's documents: exactly one of ``path``, ``tokens``, ``builtin`` and ``hub``."""

    path: str | list[str] | None = Field(
        None,
        description="Files, folders or patterns. The end of the name decides how a file is read: .jsonl, .json, "
        ".parquet, .arrow, or plain text and source code (.txt, .md, .py, ...: one document per file); those of JSON "
        "and text also with .gz, .bz2, .xz or .zst. A folder, named or matched, stands for the files below it, links "
        "followed; what of it is left out is counted and named. Relative to data.root. URLs (s3://, hf://, https://) "
        "are fetched once into data.cache_dir.",
    )
    tokens: str | list[str] | None = Field(
        None,
        description="Files, folders or patterns of token ids that tokenizer.model made, read without tokenizing again: "
        "Megatron's .bin with .idx, raw ids or .npy as OLMo's, MDS shards (mosaicml-streaming), litdata chunks. A "
        "document ends at the end mark, and where the file says so.",
    )
    format: Literal["megatron", "olmo", "mds", "litdata"] | None = Field(
        None, description="Format of tokens; null: by the files. olmo: raw ids, whatever the name of the file."
    )
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = Field(
        None,
        description="Type of the ids in raw files and in MDS columns of bytes, where the file does not say; null: for "
        "raw files the smaller of uint16 and uint32 that holds the vocabulary.",
    )
    column: str | None = Field(
        None, description="MDS column or litdata field of the ids; null: input_ids or tokens, or the only one."
    )
    concatenated: bool = Field(
        False,
        description="The records of token files are pieces of one long sequence (llm-foundry's concat_tokens): "
        "documents end at marks only. Raw files are always read so.",
    )
    builtin: str | None = Field(
        None,
        description="A built-in domain, which needs no files: code, functions, math, commonsense; for studies modular, "
        "random_answers, formal.",
    )
    hub: str | None = Field(
        None,
        description="A data set for `datasets`: a name on the Hugging Face hub, or a local folder, also one that "
        "save_to_disk wrote.",
    )
    hub_config: str | None = Field(None, description="Configuration (subset) of the hub data set.")
    hub_revision: str | None = Field(None, description="Commit or tag of the hub data set; null: the newest.")
    split: str = Field("train", description="Split of the hub data set.")
    streaming: bool = Field(
        False,
        description="Stream the hub data set instead of downloading it; it is read twice unless tokenizer.model is "
        "given.",
    )
    text_field: str = Field(
        "text",
        description="Field of a JSON object, or column of a Parquet file or hub data set, that holds the text; a.b is "
        "field b of field a. A list of texts is one document, each on a line of its own.",
    )
    filter: str | None = Field(
        None,
        description="Use only rows that pass this condition on their fields: names (a.b: field b of field a), "
        "constants, comparisons, and, or, not, len(), e.g. language == 'en' and score >= 3.",
    )
    by: str | None = Field(
        None,
        description="Split the source into domains NAME_VALUE, one for each value of this field (source, meta.subset, "
        "language, ...). The other settings hold for each of them. The source is read once more for each.",
    )
    value: str | None = Field(
        None, description="With by: use only rows of this value. Set in the domains that by makes."
    )
    most_domains: int = Field(16, ge=1, description="Domains that by may make; more values are an error.")
    limit: int | None = Field(
        None,
        ge=1,
        description="Use the first so many distinct documents; null: all. The domain is then read by one worker.",
    )
    size: int | None = Field(
        None,
        ge=1,
        description="Bytes of distinct text to use; null: all. Built-in domains: bytes to generate (default "
        "4,000,000); a planted domain ends with its table of facts, see repeats.",
    )
    weight: float | None = Field(None, gt=0, description="Weight of the domain, with data.mixture: weights.")
    repeats: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Copies of each training document in the stream, each with its own id. auto: most_repeats of them, "
        "until the next pass over the domain is worth less than data.least_worth: from then on its repeats are left "
        "out, and the run ends earlier.",
    )
    most_repeats: int = Field(16, ge=2, description="Copies at most, with repeats: auto.")
    repeats_within: float = Field(
        1.0, gt=0, le=1, description="Share of the stream within which all copies of a document lie; 1: anywhere."
    )
    eps: float | None = Field(
        None,
        gt=0,
        description="Loss in nats at or below which a panel sample counts as memorized during the run "
        "(memorized/fraction), for instance from the summary of an earlier run. null: at each reading the loss that "
        "95% of the domain's samples not trained on exceed.",
    )
    facts: FactSettings | None = Field(None, description="Facts of a planted built-in domain.")
    shuffled: bool = Field(
        False,
        description="Put the tokens of each document into a random order, which is the same in every run of a seed.",
    )
    panel_tokens: int | None = Field(None, ge=1, description="panel.tokens of this domain; null: panel.tokens.")

    @property
    def copies(self) -> int:
        """Copies of each training document that the stream holds at the start."""
        return self.most_repeats if self.repeats == "auto" else self.repeats

    @property
    def paths(self) -> list[str]:
        """The entries of ``path`` or ``tokens``."""
        given = self.tokens if self.path is None else self.path
        return [given] if isinstance(given, str) else list(given or [])

    @model_validator(mode="after")
    def _one_source(self) -> DomainSettings:
        if sum(source is not None for source in (self.path, self.tokens, self.builtin, self.hub)) != 1:
            raise ValueError("give exactly one of path, tokens, builtin and hub")
        if any(source in ([], "") for source in (self.path, self.tokens, self.hub)):
            raise ValueError("path, tokens or hub is empty: give a file, a folder, a pattern or a data set")
        if self.tokens is None:
            self._refuse_set("tokens", "format", "dtype", "column", "concatenated")
        elif self.text_field != "text":
            raise ValueError("text_field has no effect with tokens: remove it, or name their column by column")
        elif self.concatenated and (self.filter is not None or self.by is not None):
            raise ValueError("filter and by choose records, which concatenated joins: remove one of them")
        if self.builtin is not None and self.filter is not None:
            raise ValueError("filter has no effect on a built-in domain, which has no columns: remove it")
        if self.by is not None and (self.builtin is not None or self.streaming):
            where = (
                "on a built-in domain, which has no fields" if self.builtin else "with streaming, it reads many times"
            )
            raise ValueError(f"by cannot be used {where}: remove one of them")
        if self.by is None and (self.value is not None or self.most_domains != 16):
            raise ValueError("value and most_domains have no effect without by: remove them, or give by")
        if self.repeats_within < 1 and self.repeats == 1:
            raise ValueError("repeats_within has no effect with repeats: 1: remove it, or raise repeats")
        if self.hub is None:
            self._refuse_set("hub", "hub_config", "hub_revision", "split", "streaming")
        return self

    def _refuse_set(self, without: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect without {without}: remove it, or give {without}")

    @field_validator("filter")
    @classmethod
    def _parsable(cls, text: str | None) -> str | None:
        if text is not None:
            parse_filter(text)
        return text

    @model_validator(mode="after")
    def _facts_have_effect(self) -> DomainSettings:
        given = self.facts.given() if self.facts is not None else {}
        source = next(name for name in ("builtin", "path", "tokens", "hub") if getattr(self, name) is not None)
        if source == "builtin":
            source = f"builtin {self.builtin}"
        kind = f"{self.builtin} like {given.get('like')}"
        options = FACT_OPTIONS.get(kind, FACT_OPTIONS.get(self.builtin or "", ()))
        if kind in FACT_OPTIONS:
            source = f"builtin {kind}"
        if unused := [key for key in given if key not in options]:
            takes = f"facts.{', facts.'.join(options)}" if options else "no facts"
            raise ValueError(f"facts.{unused[0]} has no effect with {source}: remove it ({source} takes {takes})")
        return self


class MixturePhase(Section):
    """A later part of the stream with different weights, such as an annealing phase."""

    from_tokens: int = Field(ge=1, description="Tokens of the stream, with marks, after which the phase begins.")
    weights: dict[str, float] = Field(description="Weight per domain; a domain that is not named is not used.")


class EarlierStage(Section):
    """What the first steps of a run were trained on, where it then went on with more steps or other data."""

    steps: int = Field(ge=1, description="Steps of the run up to the end of the stage.")
    planned: int = Field(ge=1, description="Steps that the run was to have, for which its panel was drawn.")
    domains: list[str] = Field(description="The domains.")
    mixture: Literal["by_size", "weights"] = Field("by_size", description="As data.mixture.")
    weights: dict[str, float] = Field(default_factory=dict, description="Weight per domain, with mixture: weights.")
    phases: list[MixturePhase] = Field(default_factory=list, description="As data.phases.")
    stops: list[tuple[int, list[int]]] = Field(
        default_factory=list, description="Steps after which the repeats of domains, by number, were left out."
    )


class DataSettings(Section):
    domains: dict[str, DomainSettings] = Field(
        default_factory=dict, description="The domains by name, each with its source (data.domains.NAME.KEY)."
    )
    root: str = Field(
        "", description="Folder or URL that paths of domains are relative to; environment variables are expanded."
    )
    cache_dir: str = Field(
        "~/.cache/moetrain",
        description="Folder where tokenizers and token files are cached, under a hash of their sources.",
    )
    seq_len: int = Field(512, ge=8, description="Tokens of a packed row, and of the longest sample.")
    mixture: Literal["by_size", "weights"] = Field(
        "by_size",
        description="by_size: every document once. weights: in proportion to the domains' weights, no document twice.",
    )
    least_worth: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="With repeats: auto: a domain is no longer repeated once repeat/worth is below this, with an "
        "interval below 1. 1 is as good as fresh text of the domain.",
    )
    phases: list[MixturePhase] = Field(
        default_factory=list,
        description="With mixture: weights: changes of the weights, a list of {from_tokens, weights: {DOMAIN: "
        "WEIGHT}}.",
    )
    earlier: list[EarlierStage] = Field(
        default_factory=list,
        description="Stages of a run that went on from a checkpoint with more steps or other data; written by "
        "train.resume, not to be set.",
    )
    heldout_share: float = Field(
        0.01, gt=0, lt=0.5, description="Share of documents held out of training, chosen by a hash of their content."
    )
    max_bad_share: float = Field(
        0.001, ge=0, le=1, description="Largest share of a domain's lines or rows that may be unusable."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Worker processes that prepare the data; null: one per CPU core, or one if there is little data.",
    )
    pack_window: int = Field(4096, ge=1, description="Samples that are packed together by best fit.")

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
        split = [name for name, domain in self.domains.items() if domain.by is not None and domain.value is None]
        if self.phases and split:
            raise ValueError(
                f"phases cannot weigh the domains that data.domains.{split[0]}.by makes: name them in domains of their "
                "own, with by and value"
            )
        starts = [phase.from_tokens for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases begin at {starts} tokens: put them in increasing order")
        for number, phase in enumerate(self.phases):
            unknown = [name for name in phase.weights if name not in self.domains]
            if unknown:
                near = difflib.get_close_matches(unknown[0], list(self.domains), n=1, cutoff=0.0)
                hint = f": did you mean {near[0]}?" if near else ""
                raise ValueError(f"phases.{number}.weights: no domain {unknown[0]!r}{hint}")
            if any(weight < 0 for weight in phase.weights.values()) or not any(phase.weights.values()):
                raise ValueError(f"phases.{number}.weights: none may be negative, and one must be above 0")
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> DataSettings:
        names, ends = list(self.domains), [stage.steps for stage in self.earlier]
        known = [stage.domains for stage in self.earlier] + [names]
        kept = all(later[: len(own)] == own for own, later in itertools.pairwise(known))
        if ends != sorted(set(ends)) or not kept:
            raise ValueError(
                "earlier: its stages do not fit the domains: leave it out; train.resume=CHECKPOINT writes it"
            )
        return self

    @model_validator(mode="after")
    def _weights(self) -> DataSettings:
        missing = [name for name, domain in self.domains.items() if domain.weight is None]
        if self.mixture == "weights" and missing:
            raise ValueError(f"mixture: weights needs data.domains.{missing[0]}.weight")
        given = [name for name, domain in self.domains.items() if domain.weight is not None]
        auto = [name for name, domain in self.domains.items() if domain.repeats == "auto"]
        if self.mixture == "weights" and auto:
            raise ValueError(
                f"data.domains.{auto[0]}.repeats: auto needs mixture: by_size, or give a number of repeats"
            )
        if self.mixture == "by_size" and given:
            raise ValueError(f"data.domains.{given[0]}.weight has no effect with by_size: set data.mixture=weights")
        return self


class TokenizerSettings(Section):
    model: str | None = Field(
        None, description="A SentencePiece .model or a tokenizer.json; null: train one on the corpus."
    )
    begin_token: str | None = Field(
        None,
        description="Token of a tokenizer.json that marks the begin of a document; null: as in its files, else a "
        "common name.",
    )
    end_token: str | None = Field(
        None, description="Token of a tokenizer.json that marks the end of a document; null: likewise."
    )
    lossy: bool = Field(
        False,
        description="Accept a tokenizer.model that changes some texts, for instance by normalization. Bytes of text, "
        "and losses per byte, are then not exact, and marked answers may not be found.",
    )
    vocab_size: int = Field(4096, ge=300, le=2**31 - 1, description="Vocabulary size of the tokenizer that is trained.")
    sample_bytes: int = Field(
        20_000_000,
        ge=1000,
        description="Bytes of text that the tokenizer is trained on, in equal parts from all domains.",
    )
    pad_to: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Round the rows of embedding and head up to a multiple of this, such as 64, which GPUs multiply "
        "faster. The added ids occur in no text, so the model learns not to predict them; an exported model has them "
        "in its vocab_size.",
    )

    def rows(self, vocab_size: int) -> int:
        """Rows of embedding and head for a vocabulary."""
        return -(-vocab_size // self.pad_to) * self.pad_to

    @model_validator(mode="after")
    def _marks(self) -> TokenizerSettings:
        if (self.begin_token or self.end_token) and not (self.model or "").endswith(".json"):
            raise ValueError("begin_token and end_token are for a tokenizer.json: set tokenizer.model to one")
        return self
