"""Settings of the monitor: streaming metrics, panel, phases, probes; and of the profiler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moetrain.config.base import Section


class PanelSettings(Section):
    samples: int = Field(
        64,
        ge=2,
        description="Panel samples per domain that are trained on early, and as many held-out ones. Samples to come "
        "fill up what is held out; there are at least a quarter as many.",
    )
    readings: int = Field(11, ge=2, description="Readings of the panel in a run, evenly spaced, beginning at step 0.")
    claim_every: int = Field(
        5,
        ge=0,
        description="Readings of the panel from one that also reads the claim ratio, by two more forward passes over "
        "the seen samples, to the next, the last reading included; 0: none does.",
    )
    repeat_every: int = Field(
        3,
        ge=0,
        description="Readings of the panel from one that also measures what the next pass over each repeated domain is "
        "worth (repeat/worth) to the next, the last included; 0: none does. It takes four to five times the time of a "
        "reading of these domains, and memory for a copy of the weights and their gradient.",
    )
    linear_kernel: bool = Field(
        False, description="Store the inputs of each layer too, for kernel/d_eff_linear; takes 2 bytes per feature."
    )
    tokens: int = Field(40, ge=1, description="Text tokens at the start of a sample over which routing is compared.")
    max_pairs: int = Field(
        200_000,
        ge=1,
        description="Pairs of samples that a mean pathway distance is taken over, chosen by a seed where there are "
        "more: all pairs of up to 632 samples. It bounds time and memory of distances with thousands of samples.",
    )
    delta: float = Field(
        0.05,
        ge=0,
        description="Nats by which the loss of a memorized sample may differ from its last: the second condition of "
        "the paper's rule, and of the online rule.",
    )


class ProbeSettings(Section):
    tasks: list[str] = Field(
        default_factory=list,
        description="Benchmarks to evaluate during training: files or patterns of items (.jsonl, also .gz; an item "
        "has domain, task, id, prompt, sep, and choices with answer, or target), relative to data.root; or hub:NAME "
        "for a supported benchmark on the Hugging Face hub such as hub:arc_easy; hub:NAME=PATH reads a local copy of "
        "it.",
    )
    task_domains: dict[str, str] = Field(
        default_factory=dict,
        description="TASK: DOMAIN, for tasks whose items name a domain that has another name in this run.",
    )
    builtin: bool = Field(
        True,
        description="Evaluate tasks of the built-in domains too: their held-out facts, and as TASK_trained the "
        "trained facts of planted domains.",
    )
    items: int = Field(100, ge=1, description="Items per task, chosen by the seed; fewer than 100 say little.")
    trained_items: int | None = Field(
        None, ge=0, description="Items per TASK_trained; null: as probes.items; 0: no such tasks."
    )
    readings: int = Field(10, ge=2, description="Readings of all tasks in a run, evenly spaced, beginning at step 0.")
    contaminated: Literal["exclude", "keep"] = Field(
        "exclude",
        description="Items found in the training text (13 consecutive words of prompt and answer, or all words if 4 "
        "to 12) are counted and listed. exclude: they are not evaluated either.",
    )
    generate: bool = Field(
        False,
        description="Also generate open answers and compare them: exact_match. Takes one forward pass over the "
        "prompts per token.",
    )
    max_new_tokens: int = Field(16, ge=1, description="Longest generated answer, in tokens.")
    embeddings: str | None = Field(
        None,
        description="A sentence-transformers model by which panel samples and probe items are paired; null: the "
        "hidden states of the trained model at the end of the run.",
    )

    @property
    def most_trained(self) -> int:
        """Items of a task about trained facts."""
        return self.items if self.trained_items is None else self.trained_items


class MonitorSettings(Section):
    enabled: bool = Field(True, description="Record routing per sample.")
    budget: Literal["fixed", "auto"] = Field(
        "fixed",
        description="fixed: panel.readings and probes.readings as set. auto: both are chosen at the start by "
        "measured time, from 10 to 100, so that the panel takes 1% and the probes 5% of a run of an hour or more, "
        "5% each of a shorter one; the chosen values are written to the run's config.yaml.",
    )
    every: int = Field(50, ge=1, description="Steps between readings of the streaming metrics.")
    exposure_window: int = Field(
        256,
        ge=8,
        description="Newest samples, per domain and number of earlier exposures, that loss/first_exposure and "
        "loss/exposure_K are means over.",
    )
    window: int = Field(
        64, ge=2, description="Newest samples per domain over which the streaming metrics are computed."
    )
    store_top: int = Field(
        0,
        ge=0,
        description="Experts per layer with the largest routing weights that are written for each training sample, "
        "to routing/samples_*.parquet; 0: none. A million samples take 40 MB with 6 layers and 2 experts, 290 MB "
        "with 16 and 8.",
    )
    tau: float = Field(0.7, gt=0, lt=1, description="Share of routing weight per layer that a pathway covers.")
    weights: Literal["softmax", "top_k"] = Field(
        "softmax",
        description="Routing weights that a sample's mean is taken of. softmax: a token's probabilities of all "
        "experts. top_k: those of the experts that it is sent to, divided by their sum. Readings of the two do not "
        "compare.",
    )


class PhaseSettings(Section):
    """Thresholds of the phase rule, see `moetrain.grokking.phase`. Studies fitted and tested those of the share."""

    documents: int = Field(
        8, ge=2, description="Smallest number of documents in the panel, of each of seen and unseen, for a verdict."
    )
    trend: int = Field(5, ge=3, description="Readings of a loss through which a line is fitted.")
    steep: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Fall of that line as a share of the whole fall so far; above it the loss still falls.",
    )
    learned: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of its value before the training by which the loss must have fallen for a verdict.",
    )
    learned_answers: float = Field(
        0.6,
        gt=0,
        lt=1,
        description="Likewise where the documents mark answers, of the loss under the frequencies of tokens "
        "(loss/panel_frequencies): answers can be learned completely.",
    )
    memorized: float = Field(
        0.09,
        gt=0,
        lt=1,
        description="memorized/share at or above which the phase is memorizing, below it generalizing.",
    )
    memorized_answers: float = Field(0.21, gt=0, lt=1, description="Likewise where the documents mark answers.")
    sure: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Memorizing needs the lower end of the share's interval at this part of its threshold, or above.",
    )
    window: int = Field(
        3, ge=1, description="Readings for which a domain must have been generalizing before it can be settled."
    )


class ProfileSettings(Section):
    """A trace of training steps by torch.profiler, in the run's folder ``profile``."""

    start: int | None = Field(
        None, ge=1, description="First step of the trace, 1 the first of the run; null: no trace."
    )
    steps: int = Field(3, ge=1, description="Number of steps in the trace; a few take tens of megabytes.")
