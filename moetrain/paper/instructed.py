"""The paper's protocol of evaluation: every checkpoint is fine-tuned with LoRA on instructions, then probed.

Scores are kept in one file for each checkpoint, so that a command that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moetrain.atomic_io import write_file
from moetrain.checkpoint.manager import list_checkpoints
from moetrain.checkpoint.restore import TrainedModel, open_model
from moetrain.data.instructions import Example
from moetrain.data.items import right_answer
from moetrain.distributed.mesh import ParallelLayout
from moetrain.paper.results import PaperError
from moetrain.probes.fine_tuning import LoraSettings, add_adapters, encode_examples, fine_tune
from moetrain.probes.membership import without_members
from moetrain.probes.requests import BATCH_TOKENS
from moetrain.probes.scoring import prepare, score
from moetrain.probes.tasks import Task

LEAST_CHECKPOINTS = 3
EVERY_DOMAIN = "*"
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Protocol:
    """What the checkpoints are fine-tuned on and asked.

    Attributes:
        tasks: answered right or wrong.
        instructions: by domain of the tasks, or ``*`` for those without their own.
        lora: the adapters and their training.
        removed: share of each task's items that is left out, by Min-K%++ of the newest checkpoint.
    """

    tasks: Sequence[Task]
    instructions: Mapping[str, Sequence[Example]]
    lora: LoraSettings
    removed: float

    def examples(self, domain: str) -> Sequence[Example]:
        """The instructions for a domain.

        Raises:
            PaperError: there are none.
        """
        found = self.instructions.get(domain) or self.instructions.get(EVERY_DOMAIN)
        if not found:
            raise PaperError(f"--instructions: none for domain {domain}: give {domain}=FILE, or FILE for all domains")
        return found

    @property
    def fingerprint(self) -> str:
        """Changes with everything that scores depend on, but for the model."""
        content = [
            {task.name: [str(item["id"]) for item in task.items] for task in self.tasks},
            {domain: [example.text for example in examples] for domain, examples in self.instructions.items()},
            asdict(self.lora),
            self.removed,
        ]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Scored:
    """Answers at each checkpoint, by task; shapes I items, T checkpoints."""

    steps: np.ndarray  # [T]
    tasks: Sequence[Task]
    after: Mapping[str, np.ndarray]  # bool [I, T], fine-tuned
    before: Mapping[str, np.ndarray]  # bool [I, T], zero-shot
    removed: Mapping[str, list[str]]  # ids of items left out as likely training text

    def of_domain(self, domain: str, after: bool = True) -> np.ndarray:
        """[I, T] of all tasks of a domain."""
        chosen = self.after if after else self.before
        return np.concatenate([chosen[task.name] for task in self.tasks if task.domain == domain])

    def chance(self, domain: str) -> float:
        """Mean over tasks, weighted by items."""
        own = [task for task in self.tasks if task.domain == domain]
        return float(np.average([task.chance for task in own], weights=[len(task.items) for task in own]))

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(task.domain for task in self.tasks))


def score_checkpoints(run: Path, protocol: Protocol, cache: Path, progress: Progress) -> Scored:
    """Fine-tune and probe each checkpoint of a run.

    Args:
        cache: folder of the files of scores.

    Raises:
        PaperError: too few checkpoints, no task, or no instructions for a domain.
        CheckpointError, FineTuningError: a checkpoint that cannot be read or tuned.
    """
    folders = list_checkpoints(run)
    if len(folders) < LEAST_CHECKPOINTS:
        raise PaperError(
            f"{run}: {len(folders)} checkpoints are kept, the protocol needs {LEAST_CHECKPOINTS} or more: train with "
            "train.checkpoint_every=N train.keep_every=N"
        )
    if not protocol.tasks:
        raise PaperError(f"{run}: no task that is answered right or wrong: give some with --tasks")
    for domain in dict.fromkeys(task.domain for task in protocol.tasks):
        protocol.examples(domain)
    newest = open_model(folders[-1])
    tasks, removed = without_members(
        newest.model, protocol.tasks, newest.tokenizer, newest.settings.data.seq_len, protocol.removed
    )
    tasks = [task for task in tasks if task.items]
    cache.mkdir(parents=True, exist_ok=True)
    key = f"{protocol.fingerprint}-{newest.checkpoint.name}"
    records, steps = [], []
    for number, folder in enumerate(folders):
        progress("fine-tuning and probing checkpoints", number, len(folders))
        step = int(folder.name.removeprefix("step_"))
        file = cache / f"rank{protocol.lora.rank}_step_{step:08d}.json"
        record = _cached(file, key)
        if record is None:
            record = {"key": key, "step": step, **_scores(folder, tasks, protocol)}
            write_file(file, json.dumps(record) + "\n")
        records.append(record)
        steps.append(step)

    def answers(when: str) -> dict[str, np.ndarray]:
        return {
            task.name: np.stack([np.array(record[when][task.name], bool) for record in records], 1) for task in tasks
        }

    return Scored(np.array(steps), tasks, answers("after"), answers("before"), removed)


def _cached(file: Path, key: str) -> dict | None:
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def _scores(folder: Path, tasks: Sequence[Task], protocol: Protocol) -> dict:
    """Whether each item is answered right, before and after fine-tuning on the instructions for its domain."""
    before: dict[str, list[bool]] = {}
    after: dict[str, list[bool]] = {}
    groups: dict[int, list[Task]] = {}
    for task in tasks:  # tasks of domains that share instructions share one fine-tuning
        groups.setdefault(id(protocol.examples(task.domain)), []).append(task)
    for own in groups.values():
        trained = open_model(folder)
        before |= _correct(trained, own)
        settings, tokenizer = trained.settings, trained.tokenizer
        encoded = encode_examples(protocol.examples(own[0].domain), tokenizer, settings.data.seq_len)
        add_adapters(trained.model, protocol.lora)
        fine_tune(trained.model, encoded, protocol.lora, tokenizer.end_id, BATCH_TOKENS)
        after |= _correct(trained, own)
    return {"before": before, "after": after}


def _correct(trained: TrainedModel, tasks: Sequence[Task]) -> dict[str, list[bool]]:
    prepared = prepare(tasks, trained.tokenizer, trained.settings.data.seq_len, BATCH_TOKENS)
    layout = ParallelLayout(device=trained.model.lm_head.weight.device)
    scores = score(trained.model, prepared, layout)
    return {name: each.correct.tolist() for name, each in scores.items() if each.correct is not None}


def examples_from(tasks: Sequence[Task]) -> dict[str, list[Example]]:
    """Instructions from tasks about trained facts, by domain: each question with its answer."""
    found: dict[str, list[Example]] = {}
    for task in tasks:
        if task.trained:
            found.setdefault(task.domain, []).extend(
                Example(item["prompt"], item["sep"], right_answer(item)) for item in task.items
            )
    return found
