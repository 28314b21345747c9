"""Settings of what watches a run: streaming metrics, panel, phases, probes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moetrain.config.base import Section


class PanelSettings(Section):
    samples: int = Field(64, ge=2, description="Panel samples in each of a domain's three cells.")
    readings: int = Field(20, ge=2, description="Readings of the panel in a run, evenly spaced, step 0 included.")
    linear_kernel: bool = Field(
        False, description="Whether each layer's inputs are stored too, for kernel/d_eff_linear: 2 bytes a feature."
    )
    tokens: int = Field(64, ge=1, description="First tokens of a sample that routing distances compare.")


class ProbeSettings(Section):
    tasks: list[str] = Field(
        default_factory=list,
        description="Benchmarks to read while training: files or patterns of items (.jsonl, also .gz; an item has "
        "domain, task, id, prompt, sep, and choices with answer, or target), relative to data.root; or hub:NAME, one "
        "of the known ones on the Hugging Face hub such as hub:arc_easy; hub:NAME=PATH reads a local copy of it.",
    )
    task_domains: dict[str, str] = Field(
        default_factory=dict,
        description="TASK: DOMAIN of the run, for tasks whose items name a domain that the run calls otherwise.",
    )
    builtin: bool = Field(
        True,
        description="Whether built-in domains bring tasks of their own: held-out facts, and TASK_trained, which asks "
        "for trained facts of planted domains.",
    )
    items: int = Field(200, ge=1, description="Items of a task, a seeded choice; fewer than 100 say little.")
    trained_items: int | None = Field(
        None, ge=0, description="Items of each TASK_trained; null: as probes.items; 0: no such tasks."
    )
    readings: int = Field(10, ge=2, description="Readings of all tasks in a run, evenly spaced, step 0 included.")
    contaminated: Literal["exclude", "keep"] = Field(
        "exclude",
        description="Items found in training text (13 words of prompt and answer in a row, or all of 4 to 12) are "
        "counted and listed; exclude also leaves them out of the probes.",
    )
    generate: bool = Field(
        False,
        description="Whether open answers are also generated, token by token, and compared: exact_match. It costs a "
        "forward pass over the prompts for each token.",
    )
    max_new_tokens: int = Field(16, ge=1, description="Tokens after which a generated answer is cut off.")
    embeddings: str | None = Field(
        None,
        description="A sentence-transformers model that panel samples and probe items are paired by; null: the "
        "model's own hidden states at the end of the run.",
    )

    @property
    def most_trained(self) -> int:
        """Items of a task that asks for trained facts."""
        return self.items if self.trained_items is None else self.trained_items


class MonitorSettings(Section):
    enabled: bool = Field(True, description="Whether routing is recorded by sample.")
    budget: Literal["fixed", "auto"] = Field(
        "fixed",
        description="fixed: panel.readings and probes.readings as they are set. auto: both are chosen at the start, by "
        "measured time, so that the panel takes 1% and the probes 5% of a run of an hour or more, 15% each of a "
        "shorter one, from 10 to 100 readings; the run's config.yaml holds what was chosen.",
    )
    every: int = Field(50, ge=1, description="Steps between readings of the streaming metrics.")
    window: int = Field(64, ge=2, description="Newest samples of a domain that the streaming metrics are taken over.")
    store_top: int = Field(
        0,
        ge=0,
        description="Heaviest experts a layer whose share of each training sample's routing is written to "
        "routing/samples_*.parquet; 0: none. A million samples take 40 MB at 6 layers and 2 experts, 290 MB at 16 "
        "and 8.",
    )
    tau: float = Field(0.7, gt=0, lt=1, description="Share of routing weight that a pathway keeps in each layer.")


class PhaseSettings(Section):
    """Thresholds of the phase rule, see `moetrain.grokking.phase`; a study fitted and tested those of routing."""

    samples: int = Field(64, ge=1, description="Seen panel samples below which nothing is said.")
    trend: int = Field(5, ge=3, description="Readings of the loss that the line through it is made of.")
    steep: float = Field(
        0.05, gt=0, lt=1, description="Fall over those, of the fall so far, from which on it is learning."
    )
    learned: float = Field(
        0.8, gt=0, lt=1, description="Share of its highest reading that the loss must have fallen by."
    )
    window: int = Field(3, ge=1, description="Readings of leave-one-out accuracy that are averaged.")
    answers: int = Field(96, ge=1, description="Samples with a marked answer below which it is not judged.")
    generalizing: float = Field(0.13, ge=0, le=1, description="Leave-one-out accuracy that speaks for generalizing.")
    memorizing: float = Field(
        0.11, ge=0, le=1, description="Leave-one-out accuracy up to which it speaks for memorizing."
    )
    still: float = Field(0.05, gt=0, lt=1, description="Rise over a window up to which a domain has settled.")

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> PhaseSettings:
        if self.memorizing > self.generalizing:
            raise ValueError(
                f"memorizing {self.memorizing} is above generalizing {self.generalizing}: a domain would be both"
            )
        return self
