"""Scoring: forward passes over prepared requests, and the metrics of each task.

For each item: the log-probability of each choice, summed over its tokens. For each task: accuracy by that sum and by
the sum per character, bits per byte of the right answer, and the softmax probability of the right choice, as in OLMo's
in-loop evaluations; each with the standard error of its mean over items.

Shapes: N tokens of a batch, K scored tokens of a batch, D hidden size, R requests, I items, C choices, G generated
answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moetrain.data.instructions import Example
from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import Estimate
from moetrain.metrics.latest import as_metric
from moetrain.models.loss import log_probabilities
from moetrain.models.transformer import Transformer
from moetrain.probes.generation import generate, is_exact, is_generated
from moetrain.probes.requests import (
    Request,
    RequestBatch,
    equal_passes,
    make_requests,
    pack_requests,
    scored_hidden_states,
)
from moetrain.probes.tasks import Task


@dataclass(frozen=True)
class Measured:
    """A mean over items and its standard error, which is NaN for a single item."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values_I: np.ndarray) -> Measured:
        n = len(values_I)
        error = float(values_I.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return cls(float(values_I.mean()), error, n)

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.value - 1.96 * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.value + 1.96 * self.error


@dataclass(frozen=True)
class TaskScore:
    """One reading of a task."""

    task: Task
    log_probs: list[np.ndarray]  # by item: float64 [C], nats of each choice, or [1], of the target
    correct: np.ndarray | None  # bool [I], whether the item was answered correctly; None for a likelihood task
    metrics: dict[str, Measured]  # by name, see `score`
    cut: int  # items longer than the model's context
    ties: int = 0  # items whose right choice and a wrong one have the same log-probability, the largest

    @property
    def too_few(self) -> bool:
        """Whether the task has too few items for a meaningful curve."""
        return self.task.too_few

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` and the probe's event hold it: each metric with its interval, and how it was scored."""
        metrics = {
            name: as_metric(Estimate(each.value, each.low, each.high, each.n, 0)) for name, each in self.metrics.items()
        }
        about = {"trained": self.task.trained, "chance": self.task.chance, "domain": self.task.domain}
        return {**about, "metrics": metrics, "cut": self.cut, "ties": self.ties, "too_few": self.too_few}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers by metric, and the log-probabilities of each item's choices."""
        numbers: dict[str, Any] = {name: each.value for name, each in self.metrics.items()}
        numbers |= {f"{name}_error": each.error if each.n > 1 else None for name, each in self.metrics.items()}
        items = [
            {"id": item["id"], "choice_logprobs": values.tolist()}
            for item, values in zip(self.task.items, self.log_probs, strict=True)
        ]
        about = {"domain": self.task.domain, "kind": self.task.kind, "chance": self.task.chance, "n": len(items)}
        return about | numbers | {"too_few": self.too_few, "cut": self.cut, "ties": self.ties, "items": items}


@dataclass(frozen=True)
class PreparedTask:
    """A task and the numbers of the requests of each of its items; a worked solution is an item's last request."""

    task: Task
    members: list[range]  # by item
    cut: int  # items longer than the model's context


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks encoded and packed once, to be scored many times; see `prepare`."""

    parts: list[PreparedTask]
    requests: list[Request]
    batches: list[RequestBatch]
    tokenizer: Tokenizer
    context_tokens: int
    batch_tokens: int

    @property
    def tasks(self) -> list[Task]:
        return [part.task for part in self.parts]

    @property
    def tokens(self) -> int:
        """Tokens of one reading, padding included."""
        return sum(len(batch.tokens_N) for batch in self.batches)


def prepare(tasks: Sequence[Task], tokenizer: Tokenizer, context_tokens: int, batch_tokens: int) -> PreparedTasks:
    """Encode and pack the requests of all tasks.

    Args:
        context_tokens: the longest sample that the model is trained on; longer items are cut from the left and counted.
        batch_tokens: approximate tokens of one forward pass; changes results only by rounding.
    """
    examples: list[Example] = []
    members: list[list[range]] = []
    for task in tasks:
        members.append([])
        for item in task.items:
            answers = [*item["choices"]] if task.kind == "choice" else [item["target"]]
            if task.kind != "choice" and "solution" in item:
                answers.append(item["solution"])
            members[-1].append(range(len(examples), len(examples) + len(answers)))
            examples += [Example(item["prompt"], item["sep"], answer) for answer in answers]
    requests = make_requests(examples, tokenizer, context_tokens)
    parts = [
        PreparedTask(task, own, cut=sum(any(requests[r].cut for r in item) for item in own))
        for task, own in zip(tasks, members, strict=True)
    ]
    batches = pack_requests(requests, tokenizer.end_id, batch_tokens)
    return PreparedTasks(parts, requests, batches, tokenizer, context_tokens, batch_tokens)


@torch.no_grad()
def score(
    model: Transformer,
    prepared: PreparedTasks,
    layout: ParallelLayout,
    max_new_tokens: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TaskScore]:
    """Score all tasks; each rank scores its share of the batches. All ranks must call.

    Forward passes only; training is not affected. Metrics of a task:

    - ``accuracy``: the right choice has the largest log-probability, or greedy decoding gives the target. Where k
      choices, the right one among them, have the same largest log-probability, the item counts 1 / k; it counts as
      correct only where the right choice is alone.
    - ``accuracy_per_character``: the right choice has the largest log-probability per character.
    - ``accuracy_centred``: accuracy, scaled so that chance is 0 and all correct is 1.
    - ``bpb``: bits per byte of the right answer, or of the worked solution if there is one. The bits include the
      separator, the bytes do not.
    - ``soft``: probability of the right choice among the choices.
    - ``exact_match``: the generated answer is the target and no more.

    Open tasks have no ``soft`` and no ``accuracy_per_character``; likelihood tasks have only ``bpb``.

    Args:
        model: without the launcher's wrapper.
        max_new_tokens: of a generated answer; 0 generates none.
        on_batch: called before each batch with the tokens read so far by this rank, and their total.
    """
    log_probs_R, greedy_R = _score_requests(model, prepared, layout, on_batch)
    scores = {part.task.name: _task_score(part, prepared.requests, log_probs_R, greedy_R) for part in prepared.parts}
    if max_new_tokens:
        for name, exact_I in _exact_matches(model, prepared, layout, max_new_tokens).items():
            scores[name].metrics["exact_match"] = Measured.of(exact_I)
    return scores


def _score_requests(
    model: Transformer,
    prepared: PreparedTasks,
    layout: ParallelLayout,
    on_batch: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each request's scored tokens, float64 [R]; whether greedy decoding gives them, bool [R]."""
    batches = prepared.batches[layout.rank :: layout.world_size]
    sizes = [len(batch.tokens_N) for batch in batches]
    results = []
    # All passes are launched before the first result is copied to the host.
    for number, (batch, own) in enumerate(equal_passes(batches, layout, prepared.tokenizer.end_id)):
        on_batch(sum(sizes[:number]), sum(sizes))
        hidden_KD = scored_hidden_states(model, batch)
        if own:
            # In float32: rounded to bf16, log-probabilities of different choices are often exactly equal.
            results.append(log_probabilities(hidden_KD, model.lm_head.weight.float(), batch.targets_K))
    own_scores: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch, (log_probs_K, greedy_K) in zip(batches, results, strict=True):
        starts = np.cumsum(batch.counts) - batch.counts
        log_probs = np.add.reduceat(log_probs_K.cpu().double().numpy(), starts)
        own_scores.append((batch.requests, log_probs, np.logical_and.reduceat(greedy_K.cpu().numpy(), starts)))
    log_probs_R, greedy_R = np.zeros(len(prepared.requests)), np.zeros(len(prepared.requests), bool)
    for part in layout.all_gather_objects(own_scores):  # a request is scored by one rank
        for requests, log_probs, greedy in part:
            log_probs_R[requests], greedy_R[requests] = log_probs, greedy
    return log_probs_R, greedy_R


def _exact_matches(
    model: Transformer, prepared: PreparedTasks, layout: ParallelLayout, max_new_tokens: int
) -> dict[str, np.ndarray]:
    """For each task whose answers are generated, whether the answer to each item is its target, bool [I]."""
    parts = [part for part in prepared.parts if is_generated(part.task)]
    items = [item for part in parts for item in part.task.items]
    requests = [prepared.requests[own.start] for part in parts for own in part.members]
    share = range(layout.rank, len(items), layout.world_size)
    prompts = [requests[number].tokens[: requests[number].first] for number in share]
    answers = generate(
        model,
        prompts,
        prepared.tokenizer,
        layout,
        context_tokens=prepared.context_tokens,
        batch_tokens=prepared.batch_tokens,
        max_new_tokens=max_new_tokens,
    )
    own = [is_exact(answer, items[number]) for number, answer in zip(share, answers, strict=True)]
    exact_G = np.zeros(len(items), bool)
    for rank, exact in enumerate(layout.all_gather_objects(own)):
        exact_G[rank :: layout.world_size] = exact
    ends = np.cumsum([len(part.members) for part in parts])
    by_task = np.split(exact_G, ends[:-1]) if parts else []
    return {part.task.name: exact_I for part, exact_I in zip(parts, by_task, strict=True)}


def _task_score(
    part: PreparedTask, requests: Sequence[Request], log_probs_R: np.ndarray, greedy_R: np.ndarray
) -> TaskScore:
    task, members = part.task, part.members
    rows = [log_probs_R[own.start : own.stop] for own in members]
    if task.kind == "choice":
        right = [item["answer"] for item in task.items]
        gold = [own[answer] for own, answer in zip(members, right, strict=True)]
        by_sum = np.array([_won(row, answer) for row, answer in zip(rows, right, strict=True)])
        characters = [np.array([requests[r].characters for r in own]) for own in members]
        each = zip(rows, characters, right, strict=True)
        by_character = np.array([_won(row / c, answer) for row, c, answer in each])
        soft = np.array([_softmax(row)[answer] for row, answer in zip(rows, right, strict=True)])
        metrics = _accuracies(task, by_sum)
        metrics |= {"accuracy_per_character": Measured.of(by_character), "soft": Measured.of(soft)}
        correct: np.ndarray | None = by_sum == 1
        ties = int(((by_sum > 0) & (by_sum < 1)).sum())
    else:
        gold = [own[-1] for own in members]  # the worked solution, if there is one
        rows = [row[:1] for row in rows]
        correct = greedy_R[[own[0] for own in members]] if task.kind == "open" else None
        metrics, ties = _accuracies(task, correct) if correct is not None else {}, 0
    bits = np.array([-log_probs_R[r] / math.log(2) / requests[r].bytes_ for r in gold])
    return TaskScore(task, rows, correct, metrics | {"bpb": Measured.of(bits)}, part.cut, ties)


def _won(scores_C: np.ndarray, answer: int) -> float:
    """1 where the right choice has the largest score alone, 1 / k where k choices share it, else 0."""
    best_C = scores_C == scores_C.max()
    return float(best_C[answer] / best_C.sum())


def _accuracies(task: Task, correct_I: np.ndarray) -> dict[str, Measured]:
    chance = task.chance
    measured = {"accuracy": Measured.of(correct_I)}
    if chance < 1:
        measured["accuracy_centred"] = Measured.of((correct_I - chance) / (1 - chance))
    return measured


def _softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()
