"""Delays from memorized to generalized groups where the accuracy is that of fine-tuned checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moetrain import grokking
from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import ReadingTimes
from moetrain.grokking.memorization import MIN_TAIL_IN_RUNS
from moetrain.loggers.terminal import Terminal
from moetrain.paper.groups import DomainSamples
from moetrain.paper.instructed import Scored
from moetrain.probes.embeddings import item_text, mean_hidden_states, sentence_encoder
from moetrain.replay import texts_of_run
from moetrain.report.open_run import OpenedRun
from moetrain.routing.panel import SEEN


def paired_after_tuning(
    run: OpenedRun, folder: Path, scored: Scored, terminal: Terminal
) -> tuple[dict[str, Any], list[str]]:
    """By domain, pairs of memorized groups and of items generalized after fine-tuning, with their delays; in words too.

    Groups are paired as in a run: Hungarian matching of text embeddings, by ``probes.embeddings`` or by the hidden
    states of the newest checkpoint. A domain without pairs has a note.
    """
    settings = load_settings(folder / "config.yaml")
    layout = ParallelLayout()
    panel = texts_of_run(settings, layout, terminal, start=False).panel.panel
    newest = open_model(folder)
    found: dict[str, Any] = {}
    words = []
    for domain in scored.domains:
        if domain not in run.domains:
            continue
        samples = DomainSamples(run, domain)
        members = panel.members(list(settings.data.domains).index(domain), SEEN)
        correct_IT = scored.of_domain(domain)
        memorized = {group.reading: group.members for group in samples.groups()}
        generalized = grokking.generalized_groups(correct_IT, min_tail=MIN_TAIL_IN_RUNS) if correct_IT.size else {}
        note = _why_no_pairs(memorized, generalized, samples, len(members))
        if note:
            found[domain] = {"pairs": [], "note": note}
            words.append(f"{domain}: no delay: {note}")
            continue
        tokens = [panel.stream.sequence(member)[1:-1].tolist() for member in members]
        texts = [item_text(item) for task in scored.tasks if task.domain == domain for item in task.items]
        if settings.probes.embeddings is not None:
            encode = sentence_encoder(settings.probes.embeddings)
            vectors = encode([*map(newest.tokenizer.decode, tokens), *texts])
        else:
            tokens += newest.tokenizer.encode_all(texts)
            vectors = mean_hidden_states(newest.model, tokens, newest.tokenizer, layout, settings.data.seq_len)
        pairs = grokking.pair_groups(memorized, generalized, vectors[: len(members)], vectors[len(members) :])
        times = [_times(run, steps) for steps in (samples.steps, scored.steps)]
        each = [{**asdict(pair), "delay": asdict(grokking.delay(pair, *times))} for pair in pairs]
        mean = grokking.mean_delay(pairs, *times)
        assert mean is not None
        found[domain] = {"pairs": each, "mean": asdict(mean)}
        words.append(
            f"{domain}: delay {mean.steps:+,.0f} steps, to within {mean.steps_resolution:,.0f}, over {len(pairs)} pairs"
        )
    return found, words


def _why_no_pairs(
    memorized: dict[int, np.ndarray], generalized: dict[int, np.ndarray], samples: DomainSamples, members: int
) -> str:
    if not memorized:
        return "no group of samples was memorized"
    if not generalized:
        return "no item was answered right from some checkpoint on, with three to follow"
    if members != len(samples):
        return f"{samples.broken} panel samples have routing or losses that are not finite"
    return ""


def _times(run: OpenedRun, steps: np.ndarray) -> ReadingTimes:
    """Steps, and tokens where the run counts them, else steps again."""
    tokens = run.tokens(steps.tolist())
    known = tokens if np.isfinite(tokens).all() else steps
    return ReadingTimes(steps.tolist(), [int(each) for each in known])
