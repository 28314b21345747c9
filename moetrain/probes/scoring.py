"""Scoring: what a model makes of all tasks, forward only, in one pass over prepared requests.

By item: the log-probability of each choice, summed over its tokens. By task: accuracy by that sum and by the sum a
character, bits per byte of the right answer, and the softmax probability of the right choice, as in OLMo's in-loop
evaluations; each with the standard error of its mean over items.

Shapes: N tokens of a batch, K scored tokens of a batch, D hidden size, R requests, I items, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moetrain.data.tokenizer import Tokenizer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.grokking import Estimate
from moetrain.metrics.latest import as_metric
from moetrain.models.loss import log_probabilities
from moetrain.models.transformer import Transformer
from moetrain.probes.generation import generate, is_exact, is_generated
from moetrain.probes.requests import Request, RequestBatch, batch_hidden_states, make_requests, pack_requests
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
        return self.value + 1.96 * self.error


@dataclass(frozen=True)
class TaskScore:
    """What one reading says of a task."""

    task: Task
    log_probs: list[np.ndarray]  # by item: float64 [C], nats of each choice, or [1], of the target
    correct: np.ndarray | None  # bool [I], whether the item was answered right; None for a likelihood task
    metrics: dict[
        str, Measured
    ]  # accuracy, accuracy_per_character, accuracy_centred, bpb, soft, exact_match: see score
    cut: int  # items that were longer than the model's context

    @property
    def too_few(self) -> bool:
        """Whether the task has too few items for its curves to say much."""
        return self.task.too_few

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` and the probe's event hold it: each metric with its interval, and how it was scored."""
        metrics = {
            name: as_metric(Estimate(each.value, each.low, each.high, each.n, 0)) for name, each in self.metrics.items()
        }
        about = {"trained": self.task.trained, "chance": self.task.chance, "domain": self.task.domain}
        return {**about, "metrics": metrics, "cut": self.cut, "too_few": self.too_few}

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it: numbers by metric, and the log-probabilities of each item's choices."""
        numbers: dict[str, Any] = {name: each.value for name, each in self.metrics.items()}
        numbers |= {f"{name}_error": each.error if each.n > 1 else None for name, each in self.metrics.items()}
        items = [
            {"id": item["id"], "choice_logprobs": values.tolist()}
            for item, values in zip(self.task.items, self.log_probs, strict=True)
        ]
        about = {"domain": self.task.domain, "kind": self.task.kind, "chance": self.task.chance, "n": len(items)}
        return about | numbers | {"too_few": self.too_few, "cut": self.cut, "items": items}


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks encoded and packed once, to be read many times; see `prepare`."""

    tasks: list[Task]
    requests: list[Request]
    batches: list[RequestBatch]
    members: list[list[range]]  # by task, by item: its requests; a worked solution comes last
    tokenizer: Tokenizer
    context_tokens: int
    batch_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that one reading runs through the model, padding included."""
        return sum(len(batch.tokens_N) for batch in self.batches)


def prepare(tasks: Sequence[Task], tokenizer: Tokenizer, context_tokens: int, batch_tokens: int) -> PreparedTasks:
    """Encode and pack all that scoring asks.

    Args:
        context_tokens: the longest row that the model is trained on; longer items are cut from the left and counted.
        batch_tokens: tokens of one forward pass, about; it changes results by rounding alone.
    """
    pairs: list[tuple[str, str, str]] = []
    members: list[list[range]] = []
    for task in tasks:
        members.append([])
        for item in task.items:
            answers = [*item["choices"]] if task.kind == "choice" else [item["target"]]
            if task.kind != "choice" and "solution" in item:
                answers.append(item["solution"])
            members[-1].append(range(len(pairs), len(pairs) + len(answers)))
            pairs += [(item["prompt"], item["sep"], answer) for answer in answers]
    requests = make_requests(pairs, tokenizer, context_tokens)
    batches = pack_requests(requests, tokenizer.end_id, batch_tokens)
    return PreparedTasks(list(tasks), requests, batches, members, tokenizer, context_tokens, batch_tokens)


@torch.no_grad()
def score(
    model: Transformer,
    prepared: PreparedTasks,
    layout: ParallelLayout,
    max_new_tokens: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TaskScore]:
    """Score all tasks, forward only, each rank its share of the batches; training is left as it was.

    Metrics by task: ``accuracy``: the right choice has the largest log-probability, or the greedy answer begins with
    the target; ``accuracy_per_character``: the largest log-probability a character; ``accuracy_centred``: accuracy on
    a scale where chance is 0 and all right is 1; ``bpb``: bits a byte of the right answer, or of the worked solution
    where there is one, its separator counted in the bits alone; ``soft``: probability of the right choice among the
    choices. Open answers have no ``soft`` and no ``accuracy_per_character``, likelihood tasks ``bpb`` alone.
    ``exact_match``, where answers are generated: the answer is the target and no more.

    Args:
        model: without what a launch wraps around it.
        max_new_tokens: of a generated answer; 0 generates none.
        tell: told before each batch how many tokens this rank has read, of how many.
    """
    log_probs_R, greedy_R = _score_requests(model, prepared, layout, tell)
    scores = {
        task.name: _task_score(task, prepared.requests, members, log_probs_R, greedy_R)
        for task, members in zip(prepared.tasks, prepared.members, strict=True)
    }
    if max_new_tokens:
        for name, exact in _exact_matches(model, prepared, layout, max_new_tokens).items():
            scores[name].metrics["exact_match"] = Measured.of(exact)
    return scores


def _score_requests(
    model: Transformer,
    prepared: PreparedTasks,
    layout: ParallelLayout,
    tell: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """By request: nats of its scored tokens together, float64 [R], and whether each was the likeliest, bool [R]."""
    batches = prepared.batches[layout.rank :: layout.world_size]
    log_probs_R, greedy_R = np.zeros(len(prepared.requests)), np.zeros(len(prepared.requests), bool)
    sizes = [len(batch.tokens_N) for batch in batches]
    found = []
    for number, batch in enumerate(batches):  # all are on their way before the first result is waited for
        tell(sum(sizes[:number]), sum(sizes))
        found.append(_score_batch(model, batch.to(layout.device)))
    for batch, (log_probs_K, greedy_K) in zip(batches, found, strict=True):
        starts = np.cumsum(batch.counts) - batch.counts
        log_probs_R[batch.requests] = np.add.reduceat(log_probs_K.cpu().double().numpy(), starts)
        greedy_R[batch.requests] = np.logical_and.reduceat(greedy_K.cpu().numpy(), starts)
    # A request is scored by one rank and zero on the others.
    parts = layout.all_gather_objects([log_probs_R, greedy_R])
    return np.sum([part[0] for part in parts], axis=0), np.any([part[1] for part in parts], axis=0)


def _score_batch(model: Transformer, batch: RequestBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each scored token [K] and whether it was the likeliest; the rest needs no logits."""
    hidden_ND = batch_hidden_states(model, batch)
    hidden_KD = hidden_ND.index_select(0, batch.scored_K).to(model.dtype)
    return log_probabilities(hidden_KD, model.lm_head.weight.to(model.dtype), batch.targets_K)


def _exact_matches(
    model: Transformer,
    prepared: PreparedTasks,
    layout: ParallelLayout,
    max_new_tokens: int,
) -> dict[str, np.ndarray]:
    """By task whose answers can be generated, whether each is its target, bool [I]."""
    asked = [
        (task.name, item, prepared.requests[own[0]])
        for task, members in zip(prepared.tasks, prepared.members, strict=True)
        if is_generated(task)
        for item, own in zip(task.items, members, strict=True)
    ]
    share = range(layout.rank, len(asked), layout.world_size)
    prompts = [asked[number][2].tokens[: asked[number][2].first] for number in share]
    sizes = prepared.context_tokens, prepared.batch_tokens
    answers = generate(model, prompts, prepared.tokenizer, layout, *sizes, max_new_tokens)
    exact_R = np.zeros(len(asked), bool)
    for number, answer in zip(share, answers, strict=True):
        exact_R[number] = is_exact(answer, asked[number][1])
    exact_R = np.any([part[0] for part in layout.all_gather_objects([exact_R])], axis=0)
    names = np.array([name for name, _, _ in asked])
    return {name: exact_R[names == name] for name in dict.fromkeys(names.tolist())}


def _task_score(
    task: Task, requests: Sequence[Request], members: Sequence[range], log_probs_R: np.ndarray, greedy_R: np.ndarray
) -> TaskScore:
    rows = [log_probs_R[own.start : own.stop] for own in members]
    cut = sum(any(requests[r].cut for r in own) for own in members)
    if task.kind == "choice":
        right = [item["answer"] for item in task.items]
        gold = [own[answer] for own, answer in zip(members, right, strict=True)]
        by_sum = np.array([row.argmax() for row in rows]) == right
        characters = [np.array([requests[r].characters for r in own]) for own in members]
        by_character = np.array([(row / c).argmax() for row, c in zip(rows, characters, strict=True)]) == right
        soft = np.array([_softmax(row)[answer] for row, answer in zip(rows, right, strict=True)])
        metrics = _accuracies(task, by_sum)
        metrics |= {"accuracy_per_character": Measured.of(by_character), "soft": Measured.of(soft)}
        correct: np.ndarray | None = by_sum
    else:
        gold = [own[-1] for own in members]  # the worked solution, where there is one
        rows = [row[:1] for row in rows]
        correct = greedy_R[[own[0] for own in members]] if task.kind == "open" else None
        metrics = _accuracies(task, correct) if correct is not None else {}
    bits = np.array([-log_probs_R[r] / math.log(2) / requests[r].bytes_ for r in gold])
    return TaskScore(task, rows, correct, metrics | {"bpb": Measured.of(bits)}, cut)


def _accuracies(task: Task, correct: np.ndarray) -> dict[str, Measured]:
    chance = task.chance
    measured = {"accuracy": Measured.of(correct)}
    if chance < 1:
        measured["accuracy_centred"] = Measured.of((correct - chance) / (1 - chance))
    return measured


def _softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()
