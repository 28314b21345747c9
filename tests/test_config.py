import pytest

from moetrain.config import Settings, SettingsError, describe_settings, expand, load_settings

CODE = "data.domains.code.builtin=code"


def test_every_setting_has_a_description_and_a_valid_default():
    rows = list(describe_settings())
    assert len(rows) > 50
    assert all(meaning for _, _, _, meaning in rows)
    assert len({key for key, *_ in rows}) == len(rows)
    kinds = {key: kind for key, kind, *_ in rows}
    assert kinds["data.mixture"] == "by_size | weights"
    assert kinds["data.domains.NAME.facts.rule"] == "copy | reverse | brackets | null"
    assert kinds["data.domains.NAME.repeats"] == "int | auto"
    assert kinds["data.domains.NAME.path"] == "str | list[str] | null"
    assert kinds["run.trackers"].startswith("list[wandb | mlflow | ")
    overrides = [f"{key}={default}" for key, _, default, _ in rows if not key.startswith("data.domains")]
    assert load_settings(None, [CODE, *overrides]) == load_settings(None, [CODE])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.maxsteps=3", ["train.maxsteps", "did you mean train.max_steps?"]),
        ("trian.max_steps=3", ["trian", "did you mean train?"]),
        ("data.learning_rate=3", ["data.learning_rate", "did you mean optim.learning_rate?"]),
        ("train.lr=3", ["train.lr", "did you mean optim.learning_rate?"]),
        ("model.top_k=3", ["model.top_k", "did you mean model.num_experts_per_tok?"]),
        ("modle.hidden_size=3", ["command line 'modle.hidden_size=3'", "modle", "did you mean model?"]),
        ("data.domains.code.biltin=x", ["data.domains.code.biltin", "did you mean data.domains.code.builtin?"]),
        ("train.max_steps=many", ["train.max_steps", "integer", "'many'"]),
        ("train.max_steps=0", ["train.max_steps", "greater than or equal to 1"]),
        ("optim.learning_rate=.nan", ["optim.learning_rate", "finite"]),
        ("model.experts=sparse", ["model.experts", "'grouped_mm'"]),
        ("train.expert_parallel=3", ["num_experts 16 does not split over train.expert_parallel 3", "lower"]),
        ("train.expert_parallel=0", ["train.expert_parallel", "greater than or equal to 1"]),
        ("model.num_experts_per_tok=99", ["model", "exceeds num_experts 16: lower it"]),
        ("model.hidden_size=250", ["hidden_size 250", "multiple of twice num_attention_heads"]),
        ("train.micro_batch_rows=3", ["batch_rows 16 must be a multiple of micro_batch_rows 3"]),
        ("data.mixture=weights", ["needs data.domains.code.weight"]),
        ("data.domains.code.weight=2", ["has no effect with by_size"]),
        ("data.domains.code.repeats=often", ["data.domains.code.repeats", "or 'auto' (given 'often')"]),
        ("data.domains.code.repeats=automatic", ["or 'auto' (given 'automatic'): did you mean auto?"]),
        ("data.domains.code.repeats=0", ["data.domains.code.repeats"]),
        ("data.phases=[{from_tokens: 5, weights: {code: 1}}]", ["phases have no effect with by_size"]),
        ("data.phases=[{from_token: 5, weights: {code: 1}}]", ["data.phases"]),
        ("data.domains.code.path=x", ["exactly one of path, tokens, builtin and hub"]),
        ("data.domains.code.filter=a == 1", ["data.domains.code", "no effect on a built-in domain"]),
        ("data.domains.code.streaming=true", ["data.domains.code", "streaming has no effect without hub"]),
        ("tokenizer.end_token=<s>", ["tokenizer", "are for a tokenizer.json"]),
        ("data.domains.a/b.builtin=code", ["'a/b'", "letters, digits"]),
        ("run.name=../up", ["run.name", "letters, digits"]),
        ("panel.tokens=511", ["panel tokens of code (511)", "lower panel.tokens"]),
        ("learning_rate=1", ["write section.key=value"]),
        ("run.name.first=x", ["run.name"]),
    ],
)
def test_a_wrong_setting_is_one_line_with_place_key_and_remedy(override, parts):
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [CODE, override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("data.domains.code.repeats=automatic", "auto"),
        ("data.domains.code.repeats=autop", "auto"),
        ("data.domains.code.facts.rule=revers", "reverse"),
        ("data.domains.code.format=megatron_lm", "megatron"),
        ("run.trackers=[wandb, mlfow]", "mlflow"),
        ("model.experts=Grouped", "grouped_mm"),
        ("model.attention=flash_attention", "flash_attn"),
        ("train.precision=bfloat16", "bf16"),
        ("optim.name=Adam", "adamw"),
        ("optim.schedule=linear", None),
        ("data.domains.code.repeats=0", None),
    ],
)
def test_a_setting_of_certain_words_offers_the_nearest(override, word):
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [CODE, override])
    message = str(caught.value)
    assert message.endswith(f": did you mean {word}?") if word else "did you mean" not in message
    assert " more)" not in message  # the types of a union are one error


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [1", ["run.yaml:1", "not valid YAML"]),
        ("- 1\n- 2", ["run.yaml", "holds a list"]),
        ("model: {num_expert: 3}", ["run.yaml: model.num_expert", "did you mean model.num_experts?"]),
        ("data:\n  domains:\n", ["run.yaml", "data.domains"]),
        ("train: {expert_parallel: 2}\nmodel: {experts: dense}", ["run.yaml: train.expert_parallel 2", "set it to 1"]),
    ],
)
def test_an_invalid_file_is_an_error_with_its_place(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ("[{from_tokens: 5, weights: {cod: 1}}]", "no domain 'cod': did you mean code?"),
        ("[{from_tokens: 5, weights: {code: -1}}]", "none may be negative"),
        ("[{from_tokens: 5, weights: {code: 0}}]", "one must be above 0"),
        ("[{from_tokens: 5, weights: {code: 1}}, {from_tokens: 5, weights: {code: 2}}]", "in increasing order"),
    ],
)
def test_invalid_phases_of_a_mixture_are_errors(phases, expected):
    with pytest.raises(SettingsError, match=expected.replace("?", "[?]")):
        load_settings(None, [CODE, "data.mixture=weights", "data.domains.code.weight=1", f"data.phases={phases}"])


def test_a_missing_file_gets_a_suggestion(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(SettingsError, match=r"quikstart.yaml: no such configuration: did you mean .*quickstart.yaml"):
        load_settings(tmp_path / "quikstart.yaml")


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("mine.yaml", "{}", "mine"),
        ("mine.yaml", "run: {seed: 1}", "mine"),
        ("mine.yaml", "run:", "mine"),
        ("mine.yaml", "run: {name: other}", "other"),
        ("what's mine.yaml", "{}", "run"),
    ],
)
def test_a_run_without_a_name_is_named_after_its_file(tmp_path, file, text, name):
    (tmp_path / file).write_text(text)
    settings = load_settings(tmp_path / file, ["data.domains.code.builtin=code"])
    assert settings.run.name == name
    assert load_settings(tmp_path / file, ["data.domains.code.builtin=code", "run.name=third"]).run.name == "third"


def test_overrides_are_applied_and_saved_settings_load_unchanged(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {domains: {code: {builtin: code}}}\ntrain: {batch_rows: 4}\n")
    settings = load_settings(path, ["train.batch_rows=6", "optim.learning_rate=3e-4"])
    assert settings.train.batch_rows == 6
    assert settings.optim.learning_rate == 3e-4
    path.write_text(settings.to_yaml())
    assert load_settings(path) == settings


def test_environment_variables_are_expanded_or_an_error(monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    assert expand("${SOME_FOLDER}/x", "data.root") == "/data/x"
    monkeypatch.delenv("SOME_FOLDER")
    with pytest.raises(SettingsError, match=r"data.root: environment variable SOME_FOLDER is not set"):
        expand("$SOME_FOLDER/x", "data.root")


def test_shipped_configurations_load():
    from pathlib import Path

    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        assert isinstance(load_settings(path), Settings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.mixture=weights", "data.domains.a.weight=1"], "auto needs mixture: by_size"),
        (["panel.repeat_every=0"], "auto needs the monitor"),
        (["monitor.enabled=false"], "auto needs the monitor"),
        (["model.experts=dense"], "auto needs the monitor"),
    ],
)
def test_repeats_until_they_stop_paying_need_what_measures_them(overrides, words):
    base = ["data.domains.a.builtin=code", "data.domains.a.repeats=auto"]
    assert load_settings(None, base).data.domains["a"].copies == 16
    with pytest.raises(SettingsError, match=words):
        load_settings(None, [*base, *overrides])


def test_thresholds_of_the_former_phase_rule_are_left_out_with_a_warning(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("data: {domains: {a: {builtin: code}}}\nphase: {samples: 64, learned: 0.8, generalizing: 0.13}\n")
    with pytest.warns(UserWarning, match=r"old\.yaml: its section phase is left out: generalizing, samples"):
        settings = load_settings(path)
    assert settings.phase.learned == 0.1
    path.write_text("data: {domains: {a: {builtin: code}}}\nphase: {learned: 0.4}\n")
    assert load_settings(path).phase.learned == 0.4
