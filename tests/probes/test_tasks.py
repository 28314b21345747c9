import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from moetrain.config import SettingsError, load_settings
from moetrain.data import builtin
from moetrain.data.contamination import all_documents
from moetrain.data.corpus import prepare_corpus
from moetrain.data.documents import document_id, is_heldout
from moetrain.data.errors import DataError
from moetrain.data.items import read_items
from moetrain.probes import tasks as module
from moetrain.probes.tasks import load_tasks, read_task_items, tasks_of
from tests.probes.conftest import item


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def folder(tmp_path):
    """Text, some of it held out, and items of two tasks: in training text, in held-out text, and in none."""
    texts = [f"number {n} is a text of {n + 1} and {n * n} things" for n in range(1000)]
    heldout = next(text for text in texts if is_heldout(text, 0.05))
    train = next(text for text in texts if not is_heldout(text, 0.05))
    write(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    prompts = {"train": train, "heldout": heldout} | {f"none{n}": f"nobody wrote {n} yet" for n in range(150)}
    write(tmp_path / "bench" / "t.jsonl", [item(text, "?", name=name) for name, text in prompts.items()])
    choices = {"task": "u", "choices": ["a", "b", "c"]}
    write(tmp_path / "bench" / "u.jsonl.gz", [item(text, **choices, name=name) for name, text in prompts.items()])
    return tmp_path


def chosen(folder, *overrides):
    own = ["data.domains.d.path=text.jsonl", "data.heldout_share=0.05", "tokenizer.vocab_size=400", "probes.items=200"]
    return load_settings(None, [f"data.root={folder}", f"data.cache_dir={folder}/cache", *own, *overrides])


def loaded(settings):
    return load_tasks(settings, prepare_corpus(settings))


def ids(task):
    return [each["id"] for each in task.items]


def test_contaminated_items_are_excluded_or_kept_and_counted(folder):
    settings = chosen(folder, "probes.tasks=[bench/*]")
    found = loaded(settings)
    assert [(t.name, t.domain, t.kind, t.available, t.contaminated) for t in found.tasks] == [
        ("t", "d", "open", 152, 1),
        ("u", "d", "choice", 152, 1),
    ]
    for task in found.tasks:
        assert set(ids(task)) == {"heldout"} | {f"none{n}" for n in range(150)}
    train = next(document for document in all_documents(settings) if not document.heldout)
    assert {each.where for each in found.contamination.found} == {f"{document_id(train.text):016x}"}
    kept = loaded(chosen(folder, "probes.tasks=[bench]", "probes.contaminated=keep"))
    assert [(len(task.items), task.contaminated) for task in kept.tasks] == [(152, 1), (152, 1)]


def test_the_training_text_is_searched_once(folder, monkeypatch):
    settings = chosen(folder, "probes.tasks=[bench/*]")
    first = loaded(settings)

    def never(settings):
        raise AssertionError

    monkeypatch.setattr(module, "all_documents", never)
    assert loaded(settings).contamination == first.contamination
    assert not load_tasks(chosen(folder), prepare_corpus(settings)).tasks
    (report,) = (folder / "cache").glob("contamination-*.json")
    report.write_text(report.read_text()[:40])
    with pytest.raises(AssertionError):
        loaded(settings)
    monkeypatch.undo()
    assert loaded(settings).contamination == first.contamination
    write(folder / "bench" / "t.jsonl", [item("another", "?")])
    assert loaded(settings).contamination != first.contamination


def test_a_task_with_only_contaminated_items_is_excluded_and_reported(folder):
    write(folder / "bench" / "t.jsonl", [item("number 0 is a text of 1 and 0 things", "?")])
    assert not is_heldout("number 0 is a text of 1 and 0 things", 0.05)
    found = loaded(chosen(folder, "probes.tasks=[bench/*]"))
    assert [task.name for task in found.tasks] == ["u"]
    assert found.contamination.tasks["t"].contaminated == 1


def test_the_choice_of_items_depends_only_on_seed_and_ids(folder):
    settings = chosen(folder, "probes.tasks=[bench/t.jsonl, bench/u.jsonl.gz]", "probes.items=40")
    found = {task.name: ids(task) for task in loaded(settings).tasks}
    assert [len(each) for each in found.values()] == [40, 40]
    assert found["t"] != found["u"]
    for name in ("t.jsonl", "u.jsonl.gz"):
        write(folder / "bench" / name, reversed(read_items(folder / "bench" / name)))
    turned = loaded(chosen(folder, "probes.tasks=[bench/u.jsonl.gz, bench/t.jsonl]", "probes.items=40"))
    assert {task.name: ids(task) for task in turned.tasks} == found
    other = loaded(chosen(folder, "probes.tasks=[bench]", "probes.items=40", "run.seed=1"))
    assert all(ids(task) != found[task.name] for task in other.tasks)
    fewer = loaded(chosen(folder, "probes.tasks=[bench]", "probes.items=10"))
    assert all(ids(task) == found[task.name][:10] for task in fewer.tasks)


def test_task_domains_maps_tasks_to_domains_of_the_run(folder):
    write(folder / "bench" / "t.jsonl", [{**item("a", "b"), "domain": "general"}])
    plain = chosen(folder, "probes.tasks=[bench/t.jsonl]")
    assert loaded(plain).tasks[0].domain == "general"
    assert loaded(chosen(folder, "probes.tasks=[bench/t.jsonl]", "probes.task_domains={t: d}")).tasks[0].domain == "d"
    two = [{**item("a", "b"), "domain": "general"}, {**item("c", "b"), "domain": "math"}]
    write(folder / "bench" / "t.jsonl", two)
    with pytest.raises(DataError, match=r"items of t differ in domain \(general, math\): give them different tasks"):
        loaded(plain)
    assert loaded(chosen(folder, "probes.tasks=[bench/t.jsonl]", "probes.task_domains={t: d}")).tasks[0].domain == "d"


SUMS = ["data.domains.m.builtin=math", "data.domains.m.size=9000"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["probes.tasks=[none*]"], r"probes\.tasks: no file at .*none"),
        (
            ["probes.tasks=[bench]", "probes.task_domains={tt: d}"],
            r"probes\.task_domains: no task 'tt': did you mean t\?",
        ),
        (
            ["probes.tasks=[bench]", "probes.task_domains={t: dd}"],
            r"probes\.task_domains: no domain 'dd': did you mean d\?",
        ),
        (["probes.tasks=[bench/v.jsonl]"], "items of v differ in form"),
        (
            ["probes.tasks=[bench/w.jsonl]", "data.domains.m.builtin=math", "data.domains.m.size=9000"],
            "a built-in domain has a task builtin_m",
        ),
    ],
)
def test_unusable_settings_are_a_one_line_error(folder, overrides, message):
    write(folder / "bench" / "v.jsonl", [item("a", "b", task="v"), item("b", task="v", choices=["x", "y"])])
    write(folder / "bench" / "w.jsonl", [item("a", "b", task="builtin_m")])
    with pytest.raises(DataError, match=message) as caught:
        loaded(chosen(folder, *overrides))
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="NOT_SET"):
        read_task_items(chosen(folder, "probes.tasks=['$NOT_SET/x.jsonl']"))


PLANTED = [
    "data.domains.adding.builtin=modular",
    "data.domains.dividing.builtin=modular",
    "data.domains.dividing.facts={operation: divide, modulus: 13}",
    "data.domains.noise.builtin=random_answers",
    "data.domains.noise.facts={sign: '#'}",
]
OTHERS = [
    "data.domains.people.builtin=commonsense",
    "data.domains.people.size=30000",
    "data.domains.turned.builtin=math",
    "data.domains.turned.size=20000",
    "data.domains.turned.shuffled=true",
    "data.domains.python.builtin=code",
    "data.domains.python.size=1500000",
]


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    def load(*overrides, domains=PLANTED):
        cache = tmp_path_factory.getbasetemp() / "built_in"
        fixed = [f"data.cache_dir={cache}", "data.heldout_share=0.1", "tokenizer.vocab_size=400"]
        settings = load_settings(None, [*domains, *fixed, "tokenizer.sample_bytes=20000", "data.workers=1", *overrides])
        return {task.name: task for task in loaded(settings).tasks}

    return load


def test_builtin_domains_have_tasks_named_after_the_domains_of_the_run(built_in):
    found = built_in("probes.items=60", "probes.trained_items=20", domains=[*PLANTED, *OTHERS])
    assert {name: (task.domain, task.kind, task.trained, len(task.items)) for name, task in found.items()} == {
        "builtin_adding": ("adding", "choice", False, 60),
        "builtin_adding_open": ("adding", "open", False, 60),
        "builtin_adding_trained": ("adding", "choice", True, 20),
        "builtin_adding_open_trained": ("adding", "open", True, 20),
        # Division modulo 13 has 12 * 12 facts, 40% of them held out: 60 at most.
        "builtin_dividing": ("dividing", "choice", False, len(found["builtin_dividing"].items)),
        "builtin_dividing_open": ("dividing", "open", False, len(found["builtin_dividing_open"].items)),
        "builtin_dividing_trained": ("dividing", "choice", True, 20),
        "builtin_dividing_open_trained": ("dividing", "open", True, 20),
        "builtin_noise": ("noise", "choice", False, 60),
        "builtin_noise_open": ("noise", "open", False, 60),
        "builtin_noise_trained": ("noise", "choice", True, 20),
        "builtin_noise_open_trained": ("noise", "open", True, 20),
        "builtin_people": ("people", "choice", False, 60),
        "builtin_people_open": ("people", "open", False, 60),
        "builtin_python": ("python", found["builtin_python"].kind, False, len(found["builtin_python"].items)),
    }
    assert 40 <= len(found["builtin_dividing"].items) <= 60
    assert 10 <= len(found["builtin_python"].items) <= 60
    for task in found.values():
        assert {each["domain"] for each in task.items} == {task.domain}
        assert {each["task"] for each in task.items} == {task.name}


def test_items_of_planted_domains_depend_on_seed_and_options(built_in):
    for seed in (0, 3):
        found = built_in("probes.items=60", f"run.seed={seed}")
        for name, options in (("adding", {}), ("dividing", {"operation": "divide", "modulus": 13})):
            stated = {each.text for each in builtin.documents("modular", size=10**6, seed=seed, **options)}
            for task in found.values():
                if task.domain == name and task.kind == "open":
                    asked = {f"{each['prompt']} {each['target']}" for each in task.items}
                    assert asked <= stated if task.trained else not asked & stated


def test_trained_tasks_ask_for_facts_in_the_training_text(built_in):
    found = built_in("data.domains.noise.size=300", "probes.items=60")
    texts = builtin.documents("random_answers", size=300, seed=0, sign="#")
    stated = Counter(each.text.split(" =")[0] for each in texts)
    for name in ("", "_open"):
        prompts = [each["prompt"].split(" =")[0] for each in found[f"builtin_noise{name}_trained"].items]
        assert Counter(prompts) == stated


def test_builtin_tasks_can_be_turned_off(built_in):
    assert built_in("probes.builtin=false") == {}
    assert not any(task.trained for task in built_in("probes.trained_items=0").values())


def test_code_tasks_quote_held_out_documents(built_in):
    cache = ["data.heldout_share=0.1", "data.domains.python.builtin=code", "data.domains.python.size=1500000"]
    documents = all_documents(load_settings(None, cache))
    held_out = "\n".join(document.text for document in documents if document.heldout)
    for each in built_in(domains=[*PLANTED, *OTHERS])["builtin_python"].items:
        assert each["prompt"] + each["target"] in held_out


@pytest.mark.skipif("MOETRAIN_DATA" not in os.environ, reason="MOETRAIN_DATA names no folder of benchmarks")
def test_every_real_benchmark_loads():
    files = sorted(Path(os.environ["MOETRAIN_DATA"], "bench").glob("*.jsonl.gz"))
    assert len(files) > 30
    kinds = {}
    for path in files:
        (task,) = tasks_of(read_items(path), 200)
        assert task.name == path.name.removesuffix(".jsonl.gz")
        assert task.domain in ("math", "code", "general", "science")
        assert len(task.items) == min(200, task.available)
        assert 0 < task.chance <= 0.75
        kinds[task.name] = task.kind
    assert {name for name, kind in kinds.items() if kind == "likelihood"} == {"humaneval", "mbpp", "wikitext2"}
    assert {"gsm8k", "math", "svamp", "lambada"} <= {name for name, kind in kinds.items() if kind == "open"}
