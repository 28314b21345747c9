"""`MonitorCallback` in real trainings of tiny models by transformers' Trainer."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

transformers = pytest.importorskip("transformers")

import moetrain  # noqa: E402
from moetrain.checkpoint.manager import CheckpointError  # noqa: E402
from moetrain.config import load_settings  # noqa: E402
from moetrain.integrations.batches import first_tokens  # noqa: E402
from moetrain.integrations.families import FamilyError  # noqa: E402
from moetrain.integrations.rows import NO_TOKEN, MonitorError, read_rows, reading_order, row_keys  # noqa: E402
from moetrain.integrations.transformers import MonitorCallback  # noqa: E402
from moetrain.replay import own_model  # noqa: E402
from moetrain.routing.panel import HELDOUT, SEEN, TO_COME  # noqa: E402
from moetrain.routing.store import read_readings  # noqa: E402
from tests.integrations.tiny import tiny_model  # noqa: E402

TOKENS = 16


def rows(count, seed):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        source = rng.choice(["count up", "noise"])
        start, step, length = rng.randrange(90), rng.randrange(1, 89), rng.choice([12, 20, 24])
        counted = [3 + (start + step * place) % 90 for place in range(length)]
        ids = counted if source == "count up" else [3 + rng.randrange(90) for _ in range(length)]
        found.append({"input_ids": ids, "attention_mask": [1] * length, "source": source})
    return Dataset.from_list(found)


def collate(features, left=False):
    longest = max(len(each["input_ids"]) for each in features)
    ids, mask = (
        torch.zeros(len(features), longest, dtype=torch.long),
        torch.zeros(len(features), longest, dtype=torch.long),
    )
    for row, each in enumerate(features):
        length = len(each["input_ids"])
        place = slice(longest - length, None) if left else slice(length)
        ids[row, place], mask[row, place] = torch.tensor(each["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(tmp_path, *callbacks, kind="olmoe", data=None, collator=collate, model=None, **arguments):
    given = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 4,
        "save_steps": 6,
        "seed": 3,
    } | arguments
    return transformers.Trainer(
        tiny_model(kind) if model is None else model,
        transformers.TrainingArguments(
            str(tmp_path / "trained"), report_to=[], learning_rate=3e-3, disable_tqdm=True, use_cpu=True, **given
        ),
        train_dataset=rows(200, 0) if data is None else data,
        data_collator=collator,
        callbacks=list(callbacks),
    )


def monitor(folder, column="source", data=None, heldout=None, **options):
    given = {"samples": 12, "tokens": TOKENS, "readings": 4, "every": 3, "window": 8, "report": False} | options
    return MonitorCallback(column, rows(200, 0) if data is None else data, heldout, folder / "monitor", **given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    training = trainer(folder, monitor(folder, heldout=rows(60, 1), report=True))
    training.train()
    return folder, training


def test_training_is_the_same_with_and_without_it(finished, tmp_path):
    alone = trainer(tmp_path)
    alone.train()
    _, watched = finished
    for (name, weight), other in zip(
        alone.model.state_dict().items(), watched.model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert not watched.model._forward_pre_hooks  # they are removed at the end


def test_it_writes_the_files_of_a_run(finished):
    folder, _ = finished
    run = moetrain.open_run(folder / "monitor")
    assert run.domains == ["count_up", "noise"]
    assert run.reading_steps == [0, 4, 8, 12]
    tags = set(run.scalars["tag"])
    for name in run.domains:
        assert {
            f"loss/panel_seen/{name}",
            f"loss/panel_heldout/{name}",
            f"stream/d_path/{name}",
            f"phase/{name}",
        } <= tags
        assert {f"memorized/gap_heldout/{name}", f"pathway/d_path_norm/{name}", f"data/tokens/{name}"} <= tags
    assert {
        "loss/train",
        "optim/learning_rate",
        "system/monitor_share",
        "experts/load_cv",
        "experts/dead/worst",
    } <= tags
    summary = json.loads((folder / "monitor" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["parameters"]["active"] < summary["parameters"]["all"]
    assert {summary["domains"][name]["phase"] for name in run.domains} <= {
        "undecided",
        "learning",
        "memorizing",
        "generalizing",
    }
    assert "count_up" in (folder / "monitor" / "report.html").read_text()


def test_tokens_trained_on_are_counted_by_domain(finished):
    folder, _ = finished
    data = rows(200, 0)
    order = order_of_training(finished)
    trained = [data[int(row)] for row in order[: 12 * 8]]
    run = moetrain.open_run(folder / "monitor")
    for value, name in (("count up", "count_up"), ("noise", "noise")):
        expected = sum(len(row["input_ids"]) for row in trained if row["source"] == value)
        assert run.curve(f"data/tokens/{name}")["value"].iloc[-1] == expected


def order_of_training(finished):
    """The rows in the order in which a training with the same arguments reads them, from its own batches."""
    folder, _ = finished
    read = []

    class Read(transformers.TrainerCallback):
        pass

    def spy(features):
        read.extend(features)
        return collate(features)

    training = trainer(folder / "again", collator=spy, save_strategy="no")
    training.train()
    keys = {tuple(row["input_ids"]): number for number, row in enumerate(rows(200, 0))}
    return np.array([keys[tuple(row["input_ids"])] for row in read])


def test_the_panel_knows_when_its_samples_are_trained_on(finished):
    folder, _ = finished
    order = order_of_training(finished)
    data = rows(200, 0)
    reading = list(read_readings(folder / "monitor"))[-1]
    padded = np.full((len(data), TOKENS), NO_TOKEN)
    for number, row in enumerate(data):
        ids = row["input_ids"][:TOKENS]
        padded[number, : len(ids)] = ids
    step_of = dict(
        zip(row_keys(padded[order]).tolist()[::-1], (np.arange(len(order)) // 8 + 1)[::-1].tolist(), strict=True)
    )
    cells = {cell: reading.first_step[reading.cell == cell] for cell in (SEEN, TO_COME, HELDOUT)}
    assert len(cells[SEEN]) >= 4
    assert set(cells[SEEN]) == {1}  # the first tenth of 12 steps
    assert set(cells[TO_COME]) == {12}
    assert set(cells[HELDOUT]) == {0}
    for document, first, cell in zip(reading.document, reading.first_step, reading.cell, strict=True):
        assert cell == HELDOUT or step_of[int(document)] == first


def test_a_reading_holds_the_loss_and_the_routing_that_the_model_itself_gives(finished):
    folder, training = finished
    model = training.model.eval()
    data = [row for set_ in (rows(200, 0), rows(60, 1)) for row in set_ if len(row["input_ids"]) >= TOKENS]
    tokens = torch.tensor([row["input_ids"][:TOKENS] for row in data])
    by_key = dict(zip(row_keys(tokens.numpy()).tolist(), range(len(data)), strict=True))
    reading = list(read_readings(folder / "monitor"))[-1]
    chosen = tokens[[by_key[int(document)] for document in reading.document]]
    with torch.no_grad():
        output = model(input_ids=chosen, output_router_logits=True)
    losses = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), chosen[:, 1:].flatten(), reduction="none")
    assert np.allclose(reading.loss, losses.view(len(chosen), -1).mean(1), atol=1e-5)
    probs = torch.stack(output.router_logits).float().softmax(-1).view(3, len(chosen), TOKENS, -1)
    assert np.allclose(reading.weights, probs.mean(2).transpose(0, 1), atol=1e-3)  # stored in float16
    sent = torch.zeros_like(probs).scatter_(-1, probs.topk(2).indices, 1).sum(2).transpose(0, 1)
    assert (reading.counts == sent.numpy()).mean() > 0.99  # another batch may break a tie of float32 otherwise


def test_the_stream_holds_the_routing_of_what_was_trained_on(tmp_path):
    seen = []
    model = tiny_model("qwen3_moe")

    def spy(module, args, kwargs, output):
        if module.training:
            probs = torch.stack(output.router_logits).detach().softmax(-1).view(3, *kwargs["input_ids"].shape, -1)
            for row, mask in enumerate(kwargs["attention_mask"]):
                if mask.sum() >= TOKENS:
                    seen.append(probs[:, row, mask.bool()][:, :TOKENS].mean(1))

    model.register_forward_hook(spy, with_kwargs=True)
    model.config.output_router_logits = True
    watch = monitor(tmp_path)
    training = trainer(tmp_path, watch, model=model, max_steps=2, save_strategy="no")
    windows = {}

    class Last(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            windows.update(watch.run._stream.windows())

    training.add_callback(Last())
    training.train()
    held = np.concatenate([window.weights for window in windows.values()])
    expected = torch.stack(seen).numpy()
    for weights in held:
        assert np.abs(expected - weights).max((1, 2)).min() < 1e-5
    assert sum(map(len, windows.values())) == min(len(expected), 16)


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(finished, tmp_path):
    folder, _ = finished
    first = trainer(tmp_path, monitor(tmp_path, heldout=rows(60, 1)))
    first.add_callback(StopAt(9))
    first.train()
    (tmp_path / "monitor" / "summary.json").unlink()  # written because it was stopped in good order
    saved = str(tmp_path / "trained" / "checkpoint-6")
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    second = trainer(tmp_path, monitor(tmp_path, heldout=rows(60, 1), report=False), model=model)
    second.train(resume_from_checkpoint=saved)
    whole, resumed = (list(read_readings(each / "monitor")) for each in (folder, tmp_path))
    assert [reading.step for reading in whole] == [reading.step for reading in resumed]
    for one, other in zip(whole, resumed, strict=True):
        for name in ("loss", "even", "odd", "first_step", "initial", "document"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), (one.step, name)
        assert one.training_context == other.training_context
    curves = [points(each / "monitor") for each in (folder, tmp_path)]
    assert curves[0] == curves[1]
    assert not (tmp_path / "monitor-2").exists()


def test_weights_that_the_trainer_has_not_restored_are_told_with_the_remedy(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "monitor", tmp_path / "monitor")
    again = trainer(tmp_path, monitor(tmp_path, heldout=rows(60, 1)), model=tiny_model("olmoe", seed=1))
    with pytest.raises(
        MonitorError, match=r"has not restored the weight model\..*: load the model with from_pretrained"
    ):
        again.train(resume_from_checkpoint=str(folder / "trained" / "checkpoint-6"))


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def points(run):
    scalars = moetrain.open_run(run).scalars
    kept = scalars[~scalars["tag"].str.startswith(("system/", "optim/grad_norm", "loss/train"))]
    return sorted(kept[["tag", "step", "value"]].itertuples(index=False, name=None))


def test_an_earlier_run_is_kept(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "monitor", tmp_path / "monitor")
    training = trainer(tmp_path, monitor(tmp_path), max_steps=2, save_strategy="no")
    training.train()
    assert (tmp_path / "monitor-2" / "summary.json").is_file()
    assert (tmp_path / "monitor" / "summary.json").read_text() == (folder / "monitor" / "summary.json").read_text()


def test_a_state_cannot_be_replayed(finished):
    folder, _ = finished
    with pytest.raises(
        CheckpointError, match="the state of a monitor in another trainer, without a model: replay that"
    ):
        own_model(folder / "monitor" / "checkpoints" / "step_00000006")


def test_a_state_of_another_training_is_refused(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "monitor", tmp_path / "monitor")
    training = trainer(tmp_path, monitor(tmp_path, samples=4))
    with pytest.raises(MonitorError, match="has no state of this training at step 6"):
        training.train(resume_from_checkpoint=str(folder / "trained" / "checkpoint-6"))


def test_samples_to_come_stand_for_held_out_ones(tmp_path):
    training = trainer(tmp_path, monitor(tmp_path), max_steps=25, save_strategy="no")
    training.train()
    cells = {reading.step: reading for reading in read_readings(tmp_path / "monitor")}
    assert (cells[0].cell == TO_COME).sum() >= 4
    tags = set(moetrain.open_run(tmp_path / "monitor").scalars["tag"])
    assert "loss/panel_unseen/noise" in tags
    assert "loss/panel_heldout/noise" not in tags


BAD = [
    ({"column": "origin"}, {}, r"train_dataset has no column 'origin', only input_ids, attention_mask, source"),
    ({"data": rows(150, 0)}, {}, "train_dataset has 150 rows, but Trainer trains on 200"),
    ({"data": rows(200, 5)}, {}, "train_dataset, row 0: other tokens than the row that Trainer trains on"),
    ({"tokens": 40}, {}, "no row of the training data has 40 tokens and a label among them: lower tokens=40"),
    ({"heldout": rows(60, 1).remove_columns("source")}, {}, "eval_dataset has no column 'source'"),
    ({"heldout": rows(60, 1).map(lambda row: {"source": "other"})}, {}, "eval_dataset: source 'other' is no domain"),
    ({"heldout": rows(60, 1).remove_columns("input_ids")}, {}, "eval_dataset has no column 'input_ids'"),
    (
        {},
        {"collator": lambda features: {k: v.flip(1) for k, v in collate(features).items()}},
        "no sample that the model",
    ),
]


@pytest.mark.parametrize(("options", "arguments", "message"), BAD)
def test_bad_input_is_told_in_one_line(tmp_path, options, arguments, message):
    with pytest.raises(MonitorError, match=message) as error:
        trainer(tmp_path, monitor(tmp_path, **options), save_strategy="no", **arguments).train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [Dataset.from_list, list])
def test_a_row_without_tokens_is_a_short_row_and_other_content_is_told(make):
    def read(*lists):
        data = [{"input_ids": each} for each in lists]
        return read_rows(make(data), np.zeros(len(lists), np.int64), 2, "train_dataset")

    found = read([5, 6, 7], [], [8])
    assert found.tokens_nK.tolist() == [[5, 6], [NO_TOKEN, NO_TOKEN], [8, NO_TOKEN]]
    assert found.long_enough.tolist() == [True, False, False]
    for wrong, said in (
        (None, "is None"),
        ([1.5], "holds float"),
        ([[1, 2]], r"is a table of shape \(1, 2\)"),
    ):
        with pytest.raises(
            MonitorError, match=f"train_dataset, row 1: input_ids {said}.*, not a list of token numbers"
        ):
            read([], wrong)


def test_what_the_folders_settings_say_of_the_panel_is_what_is_computed(tmp_path):
    callback = monitor(tmp_path)
    training = trainer(tmp_path, callback, save_strategy="no", max_steps=1)
    panels, begin = [], callback.on_train_begin

    def then_keep(*arguments, **more):
        begin(*arguments, **more)
        panels.append(callback.run.panel)

    callback.on_train_begin = then_keep
    training.train()
    said = load_settings(tmp_path / "monitor" / "config.yaml").panel
    assert [(each.delta, each.max_pairs) for each in panels] == [(said.delta, said.max_pairs)] == [(0.05, 200_000)]


def test_a_dropped_column_is_told_with_the_remedy(tmp_path):
    callback = MonitorCallback("source", output_dir=tmp_path / "monitor")
    with pytest.raises(MonitorError, match=r"MonitorCallback\('source', train_dataset=...\)"):
        trainer(tmp_path, callback).train()


def test_a_stream_of_data_is_refused(tmp_path):
    training = trainer(tmp_path, monitor(tmp_path), data=rows(200, 0).to_iterable_dataset())
    with pytest.raises(MonitorError, match="the training data is a stream"):
        training.train()


def test_a_dense_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    training = trainer(tmp_path, monitor(tmp_path), model=transformers.LlamaForCausalLM(config))
    with pytest.raises(FamilyError, match="LlamaForCausalLM has no router"):
        training.train()


@pytest.mark.parametrize("options", [{"tau": 2.0}, {"samples": 0}, {"every": 0}, {"batch_rows": 0}])
def test_a_value_out_of_range_is_told_at_once(tmp_path, options):
    with pytest.raises(MonitorError, match=next(iter(options))):
        monitor(tmp_path, **options)


@pytest.mark.parametrize("left", [False, True])
def test_samples_are_found_behind_padding_on_either_side(left):
    features = [{"input_ids": list(range(3, 3 + length))} for length in (5, 2, 8)]
    batch = collate(features, left)
    first, length, halves = first_tokens(batch["input_ids"], batch["attention_mask"], None, 4)
    assert first.tolist() == [[3, 4, 5, 6], [3, 4, NO_TOKEN, NO_TOKEN], [3, 4, 5, 6]]
    assert length.tolist() == [5, 2, 8]
    offset = [3, 6, 0] if left else [0, 0, 0]
    for row, start in enumerate(offset):
        counted = [] if row == 1 else [start, start + 2], [] if row == 1 else [start + 1, start + 3]
        assert [half.nonzero()[:, 0].tolist() for half in halves[row]] == list(counted)


def test_samples_in_one_row_without_padding_are_told_by_their_positions():
    ids = torch.arange(3, 16)[None]
    positions = torch.tensor([[*range(5), *range(2), *range(6)]])
    first, length, halves = first_tokens(ids, None, positions, 4)
    assert first.tolist() == [[3, 4, 5, 6], [8, 9, NO_TOKEN, NO_TOKEN], [10, 11, 12, 13]]
    assert length.tolist() == [5, 2, 6]
    assert [half.nonzero()[:, 0].tolist() for half in halves[0]] == [[0, 2], [1, 3], [], [], [7, 9], [8, 10]]


def test_the_order_of_another_sampler_is_not_known():
    data = rows(20, 0)
    assert reading_order(torch.utils.data.DataLoader(data, batch_size=4)).tolist() == list(range(20))
    assert reading_order(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)) is None


def test_gradient_checkpointing_records_each_sample_once(tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        training = trainer(
            tmp_path / name,
            monitor(tmp_path / name),
            max_steps=3,
            save_strategy="no",
            gradient_checkpointing=checkpointing,
        )
        training.train()
    assert [one for one in points(tmp_path / "plain" / "monitor") if "stream" in one[0]] == [
        one for one in points(tmp_path / "checkpointed" / "monitor") if "stream" in one[0]
    ]


def test_a_model_wrapped_by_peft_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("olmoe"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    trainer(tmp_path, monitor(tmp_path), model=model, max_steps=2, save_strategy="no").train()
    assert [reading.step for reading in read_readings(tmp_path / "monitor")][-1] == 2
    assert not isinstance(model, nn.DataParallel)


def test_trl_s_trainer_is_watched_with_the_text_that_it_is_given(tmp_path):
    trl = pytest.importorskip("trl", reason="needs pip install trl")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", *map(str, range(93))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    text = [
        {"text": " ".join(str(token - 3) for token in row["input_ids"]), "source": row["source"]}
        for row in rows(200, 0)
    ]
    data = Dataset.from_list(text)
    arguments = trl.SFTConfig(
        str(tmp_path / "trained"), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no", max_length=32, dataset_num_proc=None, eos_token=None,
    )  # fmt: skip
    training = trl.SFTTrainer(
        tiny_model("qwen3_moe"),
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[monitor(tmp_path, data=data)],
    )
    training.train()
    reading = list(read_readings(tmp_path / "monitor"))[-1]
    assert reading.step == 3
    assert reading.training_context.tokens > 300
    assert (reading.first_step[reading.cell == SEEN] == 1).all()
    assert set(reading.domain) == {"count_up", "noise"}


def test_a_column_that_the_trainer_keeps_is_enough(tmp_path):
    callback = MonitorCallback("source", output_dir=tmp_path / "monitor", samples=4, tokens=TOKENS, readings=2)
    training = trainer(tmp_path, callback, max_steps=2, save_strategy="no", remove_unused_columns=False)
    training.train()
    assert [reading.step for reading in read_readings(tmp_path / "monitor")] == [0, 2]


def test_held_out_rows_may_be_several_data_sets(tmp_path):
    heldout = {"one": rows(60, 1), "two": rows(60, 2)}
    trainer(tmp_path, monitor(tmp_path, heldout=heldout, samples=64), max_steps=1, save_strategy="no").train()
    found = next(read_readings(tmp_path / "monitor"))
    count = sum(len(row["input_ids"]) >= TOKENS for each in heldout.values() for row in each)
    assert 64 < (found.cell == HELDOUT).sum() <= count


def test_gradient_accumulation_counts_steps_of_the_optimizer(tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    for name, arguments in (("whole", {"save_strategy": "no"}), ("parts", options)):
        trainer(tmp_path / name, monitor(tmp_path / name), **arguments).train()
    whole, parts = (list(read_readings(tmp_path / name / "monitor")) for name in ("whole", "parts"))
    assert [reading.step for reading in whole] == [reading.step for reading in parts]
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one.first_step, other.first_step)
        assert one.training_context.tokens == other.training_context.tokens
