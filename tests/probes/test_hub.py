import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrain.config import load_settings
from moetrain.data.errors import DataError
from moetrain.probes.hub import HUB_TASKS, read_hub_items
from moetrain.probes.tasks import read_task_items, tasks_of


def labelled(question, texts, labels, right, **more):
    return {question: "Who is it?", "choices": {"text": texts, "label": labels}, "answerKey": right, **more}


def multiple(prompt, choices, answer, **more):
    return {"prompt": prompt, "choices": choices, "answer": answer, **more}


PROMPT = "Question: Who is it?\nAnswer:"
SCIQ = {"question": "Who is it?", "correct_answer": "me", "distractor1": "you", "distractor2": "he", "support": "..."}
MMLU = {"question": "Who is it?", "choices": ["a", "b", "c", "d"], "answer": 3}

# A row of each schema, and its item.
ROWS = {
    "arc_easy": (labelled("question", ["a", "b", "c"], ["A", "B", "C"], "B", id="M_1"), multiple(PROMPT, [*"abc"], 1)),
    "arc_challenge": (labelled("question", ["a", "b"], ["1", "2"], "2", id="M_1"), multiple(PROMPT, [*"ab"], 1)),
    "openbookqa": (labelled("question_stem", ["a", "b"], ["A", "B"], " A", id="7"), multiple(PROMPT, [*"ab"], 0)),
    "commonsense_qa": (labelled("question", ["a", "b"], ["A", "B"], "B", id="7"), multiple(PROMPT, [*"ab"], 1)),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Take flour. [step] Mix.",
            "ctx_b": "then the cook",
            "endings": ["eats  it.", "[substeps] sleeps."],
            "label": "1",
        },
        multiple("Baking: How to bake. Take flour. Mix. Then the cook", ["eats it.", "sleeps."], 1),
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "hit it", "label": 0},
        multiple("Goal: open a jar\nAnswer:", ["turn the lid", "hit it"], 0),
    ),
    "winogrande": (
        {"sentence": "The cup fell off the box as the _ was thin.", "option1": "cup", "option2": "box", "answer": "2"},
        multiple("The cup fell off the box as the", ["cup was thin.", "box was thin."], 1),
    ),
    "social_iqa": (
        {"context": "Ann ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        multiple("Question: Ann ran. Why?\nAnswer:", [*"abc"], 2),
    ),
    "boolq": (
        {"passage": "Cats sleep.", "question": "do cats sleep", "label": 1, "idx": 0},
        multiple("Cats sleep.\nQuestion: do cats sleep?\nAnswer:", ["no", "yes"], 1),
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "The grass was wet.",
            "choice2": "He sang.",
            "question": "effect",
            "label": 0,
        },
        multiple("It rained so", ["the grass was wet.", "he sang."], 0),
    ),
    "lambada": ({"text": "She said to Ben"}, {"prompt": "She said to", "target": "Ben"}),
    "sciq": ({**SCIQ, "distractor3": "she"}, None),
    "medmcqa": (
        {"question": "Who is it?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2},
        multiple(PROMPT, [*"abcd"], 2),
    ),
    "medqa": (
        {"sent1": "Who is it?", **{f"ending{n}": "abcd"[n] for n in range(4)}, "label": 3},
        multiple(PROMPT, [*"abcd"], 3),
    ),
    "mmlu": ({**MMLU, "subject": "philosophy"}, multiple(PROMPT, [*"abcd"], 3, subject="philosophy")),
    "mmlu_math": ({**MMLU, "subject": "abstract_algebra"}, multiple(PROMPT, [*"abcd"], 3, subject="abstract_algebra")),
    "mmlu_code": ({**MMLU, "subject": "machine_learning"}, multiple(PROMPT, [*"abcd"], 3, subject="machine_learning")),
    "mmlu_science": ({**MMLU, "subject": "virology"}, multiple(PROMPT, [*"abcd"], 3, subject="virology")),
    "aqua": (
        {"question": "Who is it?", "options": ["A)5", "B) 6 m"], "correct": "B"},
        multiple(PROMPT, ["5", "6 m"], 1),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7"},
        {"prompt": "Question: How many?\nAnswer:", "target": "7", "solution": "3 + 4 = 7.\n#### 7"},
    ),
    "math_500": (
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
        },
        {
            "prompt": "Problem:\nWhat is $1+1$?\n\nSolution:",
            "sep": "\n",
            "target": "2",
            "solution": "It is $\\boxed{2}$.",
            "subject": "Algebra",
            "level": 1,
        },
    ),
    "svamp": (
        {"Body": "Jo has 3 pens.", "Question": "How many?", "Answer": "3.0"},
        {"prompt": "Question: Jo has 3 pens. How many?\nAnswer:", "target": "3"},
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "..."},
        {"prompt": "def f():\n", "target": "    return 1\n", "sep": ""},
    ),
    "mbpp": (
        {"task_id": 11, "text": "Write f.", "code": "def f():\r\n  return 1", "test_list": ["assert f() == 1"]},
        {"prompt": '"""\nWrite f.\nassert f() == 1\n"""\n', "target": "def f():\n  return 1", "sep": ""},
    ),
}


def test_there_is_a_row_for_each_task():
    assert ROWS.keys() == HUB_TASKS.keys()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def save(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", HUB_TASKS)
def test_rows_become_items(tmp_path, name):
    row, expected = ROWS[name]
    suffix = ".parquet" if len(name) % 2 else ".jsonl"
    save(tmp_path / f"rows{suffix}", [row, row])
    items = read_hub_items(f"hub:{name}=rows{suffix}", str(tmp_path), "probes.tasks")
    assert [item["id"] for item in items] == [f"{name}-0", f"{name}-1"]
    about = {"task": name, "domain": HUB_TASKS[name].domain, "id": f"{name}-1", "sep": " "}
    if expected is not None:
        assert items[1] == about | expected
    assert tasks_of(items)[0].name == name


def test_the_right_answer_of_sciq_is_not_always_in_one_place():
    rows = [{**SCIQ, "distractor3": "she", "question": f"Who is {n}?"} for n in range(60)]
    made = [HUB_TASKS["sciq"].convert(row) for row in rows]
    assert all(each["choices"][each["answer"]] == "me" for each in made)
    assert all(sorted(each["choices"]) == ["he", "me", "she", "you"] for each in made)
    assert {each["answer"] for each in made} == {0, 1, 2, 3}
    assert made == [HUB_TASKS["sciq"].convert(row) for row in rows]


def test_winogrande_choices_keep_text_attached_to_the_blank():
    row = {"sentence": "It was _'s cup.", "option1": "Ann", "option2": "Ben", "answer": "1"}
    assert HUB_TASKS["winogrande"].convert(row)["choices"] == ["Ann's cup.", "Ben's cup."]


def test_subjects_of_other_domains_are_skipped(tmp_path):
    save(tmp_path / "m.jsonl", [{**MMLU, "subject": subject} for subject in ("virology", "philosophy", "virology")])
    ids = [item["id"] for item in read_hub_items("hub:mmlu_science=m.jsonl", str(tmp_path), "k")]
    assert ids == ["mmlu_science-0", "mmlu_science-2"]
    with pytest.raises(DataError, match=r"k: hub:mmlu_math \(m\.jsonl\) has no rows of this task"):
        read_hub_items("hub:mmlu_math=m.jsonl", str(tmp_path), "k")


def test_a_local_folder_is_read_like_a_hub_data_set(tmp_path):
    right, wrong = ROWS["arc_easy"][0], ROWS["arc_challenge"][0]
    configs = []
    for config, row in (("ARC-Easy", right), ("ARC-Challenge", wrong)):
        (tmp_path / "arc" / config).mkdir(parents=True)
        save(tmp_path / "arc" / config / "test.parquet", [row])
        save(tmp_path / "arc" / config / "train.parquet", [wrong, wrong])
        files = "".join(f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in ("train", "test"))
        configs.append(f"- config_name: {config}\n  data_files:\n{files}")
    (tmp_path / "arc" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    settings = load_settings(None, ["data.domains.d.builtin=math", f"data.root={tmp_path}"])
    entries = ["hub:arc_easy=arc", "hub:arc_challenge=arc"]
    items = read_task_items(
        settings.model_copy(update={"probes": settings.probes.model_copy(update={"tasks": entries})})
    )
    assert [(item["task"], item["choices"]) for item in items] == [("arc_easy", [*"abc"]), ("arc_challenge", [*"ab"])]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hub:arc_esay", "no hub task 'arc_esay': did you mean hub:arc_easy?"),
        ("hub:", "no hub task '': did you mean"),
        ("arc_easy", "no file at .*arc_easy: correct the path, or write hub:arc_easy"),
        ("hub:arc_easy=none", r"hub:arc_easy \(none\): no file or folder at .*none"),
        ("hub:arc_easy=notes.txt", "notes.txt is neither"),
        ("hub:arc_easy=broken.jsonl", r"hub:arc_easy \(broken.jsonl\) cannot be read: "),
        (
            "hub:piqa=arc.jsonl",
            r"hub:piqa \(arc.jsonl\), row 0: no column 'goal' \(there are question",
        ),
        ("hub:arc_easy=arc.jsonl", r"row 1: of another form than allenai/ai2_arc \('Z' is not in list\)"),
        ("hub:piqa=piqa.jsonl", r"row 0: choice 1 is empty"),
        ("hub:sciq", r"hub:sciq \(allenai/sciq, test\) cannot be read: .*HF_HUB_OFFLINE is set"),
    ],
)
def test_unusable_input_is_a_one_line_error(tmp_path, monkeypatch, entry, message):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = ROWS["arc_easy"][0]
    save(tmp_path / "arc.jsonl", [good, {**good, "answerKey": "Z"}])
    save(tmp_path / "piqa.jsonl", [{**ROWS["piqa"][0], "sol2": ""}])
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    (tmp_path / "notes.txt").write_text("notes")
    settings = load_settings(
        None, ["data.domains.d.builtin=math", f"data.root={tmp_path}", f"probes.tasks=['{entry}']"]
    )
    with pytest.raises(DataError, match=message) as caught:
        read_task_items(settings)
    assert "\n" not in str(caught.value)


def test_up_to_one_unusable_row_in_a_hundred_is_skipped(tmp_path):
    rows = [{**ROWS["piqa"][0], "goal": f"goal {n}"} for n in range(200)]
    for bad in (7, 150):
        rows[bad] = {**rows[bad], "sol2": ""}
    save(tmp_path / "p.jsonl", rows)
    ids = [item["id"] for item in read_hub_items("hub:piqa=p.jsonl", str(tmp_path), "k")]
    assert ids == [f"piqa-{n}" for n in range(200) if n not in (7, 150)]
    rows[3] = {**rows[3], "sol1": " "}
    save(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError, match=r"k: hub:piqa \(p\.jsonl\), row 3: choice 0 is empty"):
        read_hub_items("hub:piqa=p.jsonl", str(tmp_path), "k")


def test_an_entry_given_twice_counts_once_and_two_copies_are_an_error(tmp_path):
    save(tmp_path / "a.jsonl", [ROWS["piqa"][0]])
    save(tmp_path / "b.jsonl", [ROWS["piqa"][0]])

    def read(*entries):
        chosen = f"probes.tasks=[{', '.join(entries)}]"
        return read_task_items(load_settings(None, ["data.domains.d.builtin=math", f"data.root={tmp_path}", chosen]))

    assert len(read("'hub:piqa=a.jsonl'", "'hub:piqa=a.jsonl'")) == 1
    with pytest.raises(DataError, match="item 'piqa-0' of piqa is given twice"):
        read("'hub:piqa=a.jsonl'", "'hub:piqa=b.jsonl'")
