"""The benchmarks known by name: where the hub keeps them, and how a row of each becomes an item.

Prompts are worded alike over benchmarks ("Question: ...", then "Answer:"), and answers are scored as texts, not as
letters, which small models cannot tell apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Made = dict[str, Any]
"""An item without domain, task and id; its sep is a space where it names none."""


@dataclass(frozen=True)
class HubTask:
    """A benchmark on the hub, and ``convert``, which gives a row as an item, or None where it is not part of it."""

    path: str
    config: str | None
    split: str
    domain: str
    convert: Callable[[Row], Made | None]


def _asked(question: str, choices: Sequence[str], answer: int) -> Made:
    """A question with several answers."""
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "choices": list(choices), "answer": answer}


def _labelled(question: str) -> Callable[[Row], Made]:
    """Choices as texts with labels, the right one by its label: the form of ARC, OpenBookQA, CommonsenseQA."""

    def convert(row: Row) -> Made:
        return _asked(row[question], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip()))

    return convert


def _hellaswag(row: Row) -> Made:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "prompt": _without_marks(context),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    """WikiHow's marks in brackets taken out: a title begins a sentence, other marks go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()


def _piqa(row: Row) -> Made:
    prompt = f"Goal: {row['goal'].strip()}\nAnswer:"
    return {"prompt": prompt, "choices": [row["sol1"], row["sol2"]], "answer": int(row["label"])}


def _winogrande(row: Row) -> Made:
    """The sentence up to its blank; each choice is an option and the rest of the sentence."""
    before, rest = row["sentence"].split("_", 1)
    choices = [f"{row[option]} {rest.strip()}" for option in ("option1", "option2")]
    if rest and not rest[0].isspace():
        choices = [f"{row[option]}{rest.rstrip()}" for option in ("option1", "option2")]
    return {"prompt": before.rstrip(), "choices": choices, "answer": int(row["answer"]) - 1}


def _social_iqa(row: Row) -> Made:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _asked(f"{row['context'].strip()} {row['question'].strip()}", choices, int(row["label"]) - 1)


def _boolq(row: Row) -> Made:
    prompt = f"{row['passage'].strip()}\nQuestion: {row['question'].strip().rstrip('?')}?\nAnswer:"
    return {"prompt": prompt, "choices": ["no", "yes"], "answer": int(row["label"])}


def _copa(row: Row) -> Made:
    joined = "because" if row["question"] == "cause" else "so"
    choices = [row[choice][0].lower() + row[choice][1:] for choice in ("choice1", "choice2")]
    return {"prompt": f"{row['premise'].strip().rstrip('.')} {joined}", "choices": choices, "answer": row["label"]}


def _sciq(row: Row) -> Made:
    """Without the passage that supports the answer; the choices in an order of their own, the same one each time."""
    right = row["correct_answer"]
    choices = [right, row["distractor1"], row["distractor2"], row["distractor3"]]
    choices.sort(key=lambda choice: hashlib.blake2b(f"{row['question']}\n{choice}".encode()).digest())
    return _asked(row["question"], choices, choices.index(right))


def _medmcqa(row: Row) -> Made:
    return _asked(row["question"], [row["opa"], row["opb"], row["opc"], row["opd"]], int(row["cop"]))


def _medqa(row: Row) -> Made:
    return _asked(row["sent1"], [row[f"ending{number}"] for number in range(4)], int(row["label"]))


def _aqua(row: Row) -> Made:
    """Options are written as "A)21"."""
    choices = [option.split(")", 1)[1].strip() for option in row["options"]]
    return _asked(row["question"], choices, "ABCDE".index(row["correct"]))


def _mmlu(subjects: Sequence[str] | None) -> Callable[[Row], Made | None]:
    """The rows of some subjects; None takes all."""

    def convert(row: Row) -> Made | None:
        if subjects is not None and row["subject"] not in subjects:
            return None
        return _asked(row["question"], row["choices"], int(row["answer"])) | {"subject": row["subject"]}

    return convert


def _gsm8k(row: Row) -> Made:
    """The worked solution without the notes to a calculator in it."""
    solution = re.sub(r"<<.*?>>", "", row["answer"]).strip()
    return {
        "prompt": f"Question: {row['question'].strip()}\nAnswer:",
        "target": solution.split("####")[1].strip(),
        "solution": solution,
    }


def _math_500(row: Row) -> Made:
    about = {"subject": row["subject"], "level": row["level"]}
    prompt = f"Problem:\n{row['problem'].strip()}\n\nSolution:"
    return {"prompt": prompt, "sep": "\n", "target": row["answer"], "solution": row["solution"]} | about


def _svamp(row: Row) -> Made:
    answer = str(row["Answer"]).removesuffix(".0")
    return {"prompt": f"Question: {row['Body'].strip()} {row['Question'].strip()}\nAnswer:", "target": answer}


def _lambada(row: Row) -> Made:
    prompt, _, last = row["text"].rpartition(" ")
    return {"prompt": prompt, "target": last}


def _humaneval(row: Row) -> Made:
    return {"prompt": row["prompt"], "target": row["canonical_solution"], "sep": ""}


def _mbpp(row: Row) -> Made:
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


def _arc(config: str) -> HubTask:
    return HubTask("allenai/ai2_arc", config, "test", "general", _labelled("question"))


def _mmlu_task(domain: str, subjects: Sequence[str] | None) -> HubTask:
    return HubTask("cais/mmlu", "all", "test", domain, _mmlu(subjects))


HUB_TASKS: dict[str, HubTask] = {
    "arc_easy": _arc("ARC-Easy"),
    "arc_challenge": _arc("ARC-Challenge"),
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
    "mmlu": _mmlu_task("general", None),
    **{f"mmlu_{domain}": _mmlu_task(domain, subjects.split()) for domain, subjects in _MMLU_SUBJECTS.items()},
    "aqua": HubTask("deepmind/aqua_rat", "raw", "test", "math", _aqua),
    "gsm8k": HubTask("openai/gsm8k", "main", "test", "math", _gsm8k),
    "math_500": HubTask("HuggingFaceH4/MATH-500", None, "test", "math", _math_500),
    "svamp": HubTask("ChilleD/SVAMP", None, "test", "math", _svamp),
    "humaneval": HubTask("openai/openai_humaneval", None, "test", "code", _humaneval),
    "mbpp": HubTask("google-research-datasets/mbpp", "full", "test", "code", _mbpp),
}
"""Tasks by name. Their domains are the usual four; `probes.task_domains` says what a run calls them."""
