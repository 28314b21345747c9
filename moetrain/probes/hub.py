"""Benchmarks of the Hugging Face hub, by name: where each is, and how a row of it becomes an item.

Prompts have one wording for all benchmarks ("Question: ...", then "Answer:"). Answers are scored as texts, not as
letters, which small models cannot tell apart. Rows are read with `datasets`, imported only when a task needs it, from
the hub or from a local copy; no code of a data set is run.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config import expand
from moetrain.data.errors import DataError
from moetrain.data.items import Item, check_item
from moetrain.data.sources.files import kind_of
from moetrain.data.sources.hub import one_line

PREFIX = "hub:"

_LARGEST_BAD_SHARE = 0.01

Row = Mapping[str, Any]
Fields = dict[str, Any]
"""The fields of an item that depend on the row: all but domain, task and id. Without "sep", a space."""


@dataclass(frozen=True)
class HubTask:
    """A benchmark on the hub. ``convert`` returns the fields of a row's item, or None if the row is not part of it."""

    path: str
    config: str | None
    split: str
    domain: str
    convert: Callable[[Row], Fields | None]


def _question(question: str, choices: Sequence[str], answer: int) -> Fields:
    """Fields of a multiple-choice question."""
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "choices": list(choices), "answer": answer}


def _labelled(question: str) -> Callable[[Row], Fields]:
    """Choices as texts with labels, the right one given by its label: the form of ARC, OpenBookQA, CommonsenseQA."""

    def convert(row: Row) -> Fields:
        return _question(row[question], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip()))

    return convert


def _hellaswag(row: Row) -> Fields:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "prompt": _without_marks(context),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    """Without WikiHow's marks in brackets; a title mark ends the sentence before it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()


def _piqa(row: Row) -> Fields:
    prompt = f"Goal: {row['goal'].strip()}\nAnswer:"
    return {"prompt": prompt, "choices": [row["sol1"], row["sol2"]], "answer": int(row["label"])}


def _winogrande(row: Row) -> Fields:
    """The sentence up to its blank; each choice is an option and the rest of the sentence."""
    before, rest = row["sentence"].split("_", 1)
    joined = rest.rstrip() if rest and not rest[0].isspace() else f" {rest.strip()}"
    choices = [row[option] + joined for option in ("option1", "option2")]
    return {"prompt": before.rstrip(), "choices": choices, "answer": int(row["answer"]) - 1}


def _social_iqa(row: Row) -> Fields:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"{row['context'].strip()} {row['question'].strip()}", choices, int(row["label"]) - 1)


def _boolq(row: Row) -> Fields:
    prompt = f"{row['passage'].strip()}\nQuestion: {row['question'].strip().rstrip('?')}?\nAnswer:"
    return {"prompt": prompt, "choices": ["no", "yes"], "answer": int(row["label"])}


def _copa(row: Row) -> Fields:
    joined = "because" if row["question"] == "cause" else "so"
    choices = [row[choice][0].lower() + row[choice][1:] for choice in ("choice1", "choice2")]
    return {"prompt": f"{row['premise'].strip().rstrip('.')} {joined}", "choices": choices, "answer": row["label"]}


def _sciq(row: Row) -> Fields:
    """Without the passage that supports the answer; the choices are sorted by a hash, since the right one is first."""
    right = row["correct_answer"]
    choices = [right, row["distractor1"], row["distractor2"], row["distractor3"]]
    choices.sort(key=lambda choice: hashlib.blake2b(f"{row['question']}\n{choice}".encode()).digest())
    return _question(row["question"], choices, choices.index(right))


def _medmcqa(row: Row) -> Fields:
    return _question(row["question"], [row["opa"], row["opb"], row["opc"], row["opd"]], int(row["cop"]))


def _medqa(row: Row) -> Fields:
    return _question(row["sent1"], [row[f"ending{number}"] for number in range(4)], int(row["label"]))


def _aqua(row: Row) -> Fields:
    """Options have the form "A)21"."""
    choices = [option.split(")", 1)[1].strip() for option in row["options"]]
    return _question(row["question"], choices, "ABCDE".index(row["correct"]))


def _gsm8k(row: Row) -> Fields:
    """Without the calculator annotations in the worked solution."""
    solution = re.sub(r"<<.*?>>", "", row["answer"]).strip()
    return {
        "prompt": f"Question: {row['question'].strip()}\nAnswer:",
        "target": solution.split("####")[1].strip(),
        "solution": solution,
    }


def _math_500(row: Row) -> Fields:
    about = {"subject": row["subject"], "level": row["level"]}
    prompt = f"Problem:\n{row['problem'].strip()}\n\nSolution:"
    return {"prompt": prompt, "sep": "\n", "target": row["answer"], "solution": row["solution"]} | about


def _svamp(row: Row) -> Fields:
    answer = str(row["Answer"]).removesuffix(".0")
    return {"prompt": f"Question: {row['Body'].strip()} {row['Question'].strip()}\nAnswer:", "target": answer}


def _lambada(row: Row) -> Fields:
    prompt, _, last = row["text"].rpartition(" ")
    return {"prompt": prompt, "target": last}


def _humaneval(row: Row) -> Fields:
    return {"prompt": row["prompt"], "target": row["canonical_solution"], "sep": ""}


def _mbpp(row: Row) -> Fields:
    lines = ['"""', row["text"].strip(), *row["test_list"], '"""', ""]
    return {"prompt": "\n".join(lines), "target": row["code"].replace("\r\n", "\n"), "sep": ""}


_MMLU_SUBJECTS = {
    "math": """
        abstract_algebra college_mathematics elementary_mathematics high_school_mathematics high_school_statistics
    """,
    "code": "college_computer_science computer_security high_school_computer_science machine_learning",
    "science": """
        anatomy astronomy clinical_knowledge college_biology college_chemistry college_medicine college_physics
        conceptual_physics electrical_engineering high_school_biology high_school_chemistry high_school_physics
        human_aging human_sexuality international_law jurisprudence medical_genetics nutrition professional_law
        professional_medicine virology
    """,
}


def _mmlu(domain: str, subjects: Sequence[str] | None = None) -> HubTask:
    """MMLU, or the rows of some of its subjects."""

    def convert(row: Row) -> Fields | None:
        if subjects is not None and row["subject"] not in subjects:
            return None
        return _question(row["question"], row["choices"], int(row["answer"])) | {"subject": row["subject"]}

    return HubTask("cais/mmlu", "all", "test", domain, convert)


HUB_TASKS: dict[str, HubTask] = {
    "arc_easy": HubTask("allenai/ai2_arc", "ARC-Easy", "test", "general", _labelled("question")),
    "arc_challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", "test", "general", _labelled("question")),
    "openbookqa": HubTask("allenai/openbookqa", "main", "test", "general", _labelled("question_stem")),
    "commonsense_qa": HubTask("tau/commonsense_qa", None, "validation", "general", _labelled("question")),
    "hellaswag": HubTask("Rowan/hellaswag", None, "validation", "general", _hellaswag),
    "piqa": HubTask("baber/piqa", None, "validation", "general", _piqa),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl", "validation", "general", _winogrande),
    "social_iqa": HubTask("lighteval/siqa", None, "validation", "general", _social_iqa),
    "boolq": HubTask("aps/super_glue", "boolq", "validation", "general", _boolq),
    "copa": HubTask("aps/super_glue", "copa", "validation", "general", _copa),
    "lambada": HubTask("EleutherAI/lambada_openai", "default", "test", "general", _lambada),
    "sciq": HubTask("allenai/sciq", None, "test", "science", _sciq),
    "medmcqa": HubTask("openlifescienceai/medmcqa", None, "validation", "science", _medmcqa),
    "medqa": HubTask("GBaker/MedQA-USMLE-4-options-hf", None, "test", "science", _medqa),
    "mmlu": _mmlu("general"),
    **{f"mmlu_{domain}": _mmlu(domain, subjects.split()) for domain, subjects in _MMLU_SUBJECTS.items()},
    "aqua": HubTask("deepmind/aqua_rat", "raw", "test", "math", _aqua),
    "gsm8k": HubTask("openai/gsm8k", "main", "test", "math", _gsm8k),
    "math_500": HubTask("HuggingFaceH4/MATH-500", None, "test", "math", _math_500),
    "svamp": HubTask("ChilleD/SVAMP", None, "test", "math", _svamp),
    "humaneval": HubTask("openai/openai_humaneval", None, "test", "code", _humaneval),
    "mbpp": HubTask("google-research-datasets/mbpp", "full", "test", "code", _mbpp),
}
"""The benchmarks by name. The setting `probes.task_domains` maps them to the domains of a run."""


@dataclass(frozen=True)
class HubEntry:
    """An entry ``hub:NAME`` of the setting `probes.tasks`, or ``hub:NAME=PATH`` for a local copy."""

    name: str
    task: HubTask
    local_path: str  # "" for the hub

    @classmethod
    def parse(cls, entry: str, key: str) -> HubEntry:
        """The entry with this text, given in the setting ``key``.

        Raises:
            DataError: an unknown name.
        """
        name, _, local = entry.removeprefix(PREFIX).partition("=")
        if name not in HUB_TASKS:
            nearest = difflib.get_close_matches(name, HUB_TASKS, n=1, cutoff=0.0)[0]
            known = ", ".join(HUB_TASKS)
            raise DataError(f"{key}: no hub task {name!r}: did you mean {PREFIX}{nearest}? There are {known}")
        return cls(name, HUB_TASKS[name], local)


def read_hub_items(entry: str, root: str, key: str) -> list[Item]:
    """The items of an entry ``hub:NAME`` or ``hub:NAME=PATH``.

    Up to one row in a hundred may be unusable (an empty choice, say) and is skipped: users cannot correct it.

    Args:
        root: the folder that a relative path starts from.
        key: the setting that holds the entry, for messages.

    Raises:
        DataError: an unknown name, a data set that cannot be loaded, or rows of another form.
        SettingsError: an environment variable that is not set.
    """
    hub = HubEntry.parse(entry, key)
    place = f"{key}: {PREFIX}{hub.name} ({hub.local_path or f'{hub.task.path}, {hub.task.split}'})"
    with one_line(place, f"correct the entry, or give a local copy as {PREFIX}{hub.name}=PATH"):
        local = Path(expand(root, "data.root"), expand(hub.local_path, key)) if hub.local_path else None
        rows = _rows(hub.task, local, place)
    items: list[Item] = []
    errors: list[DataError] = []
    for number, row in enumerate(rows):
        try:
            item = _item(hub, number, row, f"{place}, row {number}")
        except DataError as error:
            errors.append(error)
        else:
            items += [item] if item is not None else []
    if len(errors) > _LARGEST_BAD_SHARE * len(rows):
        raise errors[0]
    if not items:
        raise DataError(f"{place} has no rows of this task: give another copy")
    return items


def _rows(task: HubTask, local: Path | None, place: str) -> Any:
    """The rows of the task's split. A local file holds all of them; a local folder is read like a hub data set."""
    import datasets

    if local is None:
        return datasets.load_dataset(task.path, task.config, split=task.split)
    if local.is_dir():
        config = task.config if task.config in datasets.get_dataset_config_names(str(local)) else None
        return datasets.load_dataset(str(local), config, split=task.split)
    if not local.is_file():
        raise DataError(f"{place}: no file or folder at {local}: correct the path, or data.root it starts from")
    kind = {"jsonl": "json", "parquet": "parquet"}.get(kind_of(local) or "")
    if kind is None:
        raise DataError(f"{place}: {local} is neither .jsonl, .json nor .parquet: convert it")
    return datasets.load_dataset(kind, data_files=str(local), split="train")


def _item(hub: HubEntry, number: int, row: dict[str, Any], place: str) -> Item | None:
    """A row as an item; None where it is not part of the task."""
    try:
        converted = hub.task.convert(row)
    except KeyError as error:
        raise DataError(f"{place}: no column {error} (there are {', '.join(row)}): give a copy that has it") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        message = f"{place}: of another form than {hub.task.path} ({error}): give a copy of the same form"
        raise DataError(message) from None
    if converted is None:
        return None
    about = {"domain": hub.task.domain, "task": hub.name, "id": f"{hub.name}-{number}", "sep": " "}
    return check_item(about | converted, place)
