"""Fine-tuning compared with slow references: the LoRA formula, losses by hand, one example per forward pass."""

import copy
import json
import math
import random
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from moetrain.data.instructions import Example
from moetrain.probes import fine_tuning
from moetrain.probes.fine_tuning import (
    FineTuningError,
    LoraSettings,
    add_adapters,
    encode_examples,
    fine_tune,
    save_adapters,
)
from moetrain.probes.requests import batch_hidden_states, pack_requests
from tests.probes.conftest import small_model

peft = pytest.importorskip("peft", reason="the extra 'instruct' is not installed")

FAST = LoraSettings(rank=4, alpha=8.0, learning_rate=1e-2, epochs=4, batch_size=5)
CONTEXT = 64


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(2)
    pairs = [(rng.randint(0, 20), rng.randint(0, 20)) for _ in range(16)]
    sums = [Example(f"{a} plus {b} is", " ", f"{a + b}.") for a, b in pairs]
    return [*sums, Example("Ada has a drum. " * 20, "", "Yes.")]


@pytest.fixture(scope="module")
def examples(texts, tokenizer):
    return encode_examples(texts, tokenizer, CONTEXT)


def tune(model, examples, tokenizer, settings=FAST, batch_tokens=10_000):
    adapted = add_adapters(model, settings)
    return adapted, fine_tune(model, examples, settings, tokenizer.end_id, batch_tokens)


def hidden(model, examples, tokenizer):
    (batch,) = pack_requests(examples, tokenizer.end_id, 10**6)
    with torch.no_grad():
        return batch_hidden_states(model, batch)


def test_response_and_end_mark_are_scored_and_the_rest_is_context(texts, examples, tokenizer):
    for text, each in zip(texts, examples, strict=True):
        assert each.tokens[0] == tokenizer.begin_id
        assert each.tokens[-1] == tokenizer.end_id
        learned = tokenizer.decode(each.tokens[each.first : -1].tolist())
        assert learned.strip() == text.answer
        assert each.cut == (text is texts[-1])
        if not each.cut:
            assert tokenizer.decode(each.tokens[1:-1].tolist()) == text.text
    assert examples[-1].read == CONTEXT


def test_only_adapters_change_and_the_base_keeps_its_bits(tokenizer, examples):
    model = small_model(tokenizer.vocab_size)
    names = dict(model.named_parameters())
    before = {id(parameter): (name, parameter.detach().clone()) for name, parameter in names.items()}
    add_adapters(model, FAST)
    fresh = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    assert len(fresh) == 2 * 3 * model.settings.num_hidden_layers
    assert all(".lora_" in name for name in fresh)
    tuned = fine_tune(model, examples, FAST, tokenizer.end_id, 10_000)
    assert tuned.parameters == sum(each.numel() for each in fresh.values()) == 2 * 3 * 2 * 4 * 32
    kept = 0
    for name, parameter in model.named_parameters():
        if name in fresh:
            assert not torch.equal(parameter, fresh[name]), name
        else:
            assert torch.equal(parameter, before[id(parameter)][1]), name
            kept += 1
    assert kept == len(before)
    assert not any(module.training for module in model.modules())


def test_untrained_adapters_change_nothing_and_trained_ones_add_their_product(tokenizer, examples):
    model = small_model(tokenizer.vocab_size).eval()
    plain, base = hidden(model, examples, tokenizer), copy.deepcopy(model)
    add_adapters(model, FAST)
    torch.testing.assert_close(hidden(model.eval(), examples, tokenizer), plain, rtol=0, atol=0)
    fine_tune(model, examples, FAST, tokenizer.end_id, 10_000)
    after = hidden(model, examples, tokenizer)
    assert (after - plain).abs().max() > 0.1
    with torch.no_grad():
        for layer, own in zip(base.model.layers, model.model.layers, strict=True):
            for name in FAST.modules:
                tuned = getattr(own.self_attn, name)
                product = tuned.lora_B["default"].weight @ tuned.lora_A["default"].weight
                getattr(layer.self_attn, name).weight += FAST.alpha / FAST.rank * product
    torch.testing.assert_close(hidden(base, examples, tokenizer), after, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_over_response_tokens_and_falls(tokenizer, examples):
    model = small_model(tokenizer.vocab_size).eval()
    settings = replace(FAST, dropout=0.0, batch_size=len(examples), epochs=12)
    nats = []
    for each in examples:
        logits = hidden(model, [each], tokenizer)[: each.read] @ model.lm_head.weight.T
        targets = torch.from_numpy(each.tokens[1:].astype(np.int64))
        by_token = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        nats.append(by_token[each.first - 1 :].detach())
    _, tuned = tune(model, examples, tokenizer, settings)
    assert tuned.losses[0] == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)
    assert tuned.response_tokens == sum(map(len, nats))
    assert tuned.losses[-1] < tuned.losses[0] - 1
    assert tuned.losses_by_epoch == pytest.approx(tuned.losses)


def test_a_step_is_the_same_in_one_forward_pass_and_in_several(tokenizer, examples):
    settings = replace(FAST, dropout=0.0, epochs=1)
    parts = [tune(small_model(tokenizer.vocab_size), examples, tokenizer, settings, size)[1] for size in (10_000, 20)]
    assert parts[0].losses == pytest.approx(parts[1].losses, rel=1e-4)


def test_the_result_depends_only_on_the_seed(tokenizer, examples):
    def run(seed):
        model = small_model(tokenizer.vocab_size)
        torch.manual_seed(random.randrange(1000))  # earlier random numbers must not matter
        state = torch.get_rng_state()
        _, tuned = tune(model, examples, tokenizer, replace(FAST, epochs=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return tuned.losses, hidden(model, examples, tokenizer)

    (losses, after), (again, same), (others, other) = run(1), run(1), run(2)
    assert losses == again
    assert torch.equal(after, same)
    assert losses != others
    assert not torch.equal(after, other)


def test_each_epoch_sees_every_example_once_and_the_rate_falls_to_zero(tokenizer, examples, monkeypatch):
    batches, rates = [], []
    real = torch.optim.AdamW.step

    def step(self, *given):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *given)

    def backward(model, members, *given):
        batches.append([each.tokens.tobytes() for each in members])
        return own(model, members, *given)

    own = fine_tuning._backward
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(fine_tuning, "_backward", backward)
    reported = []
    settings = replace(FAST, epochs=2)
    model = small_model(tokenizer.vocab_size)
    add_adapters(model, settings)
    fine_tune(model, examples, settings, tokenizer.end_id, 10_000, lambda *given: reported.append(given))
    assert [len(members) for members in batches] == [5, 5, 5, 2] * 2
    epochs = [list(chain(*each)) for each in (batches[:4], batches[4:])]
    everything = sorted(each.tokens.tobytes() for each in examples)
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert rates == pytest.approx([1e-2 * (1 - n / 8) for n in range(8)])
    assert [given[0] for given in reported] == list(range(1, 9)) == list(range(1, 1 + settings.steps(len(examples))))
    assert sum(given[2] for given in reported) == 2 * sum(each.read for each in examples)


def test_bf16_and_other_models_are_tuned_too(tokenizer, examples):
    changes = [{"experts": "dense"}, {"num_shared_experts": 1, "balancing": "bias"}, {"tie_word_embeddings": True}]
    settings = replace(FAST, dropout=0.0, modules=("q_proj", "o_proj"))
    for change in changes:
        model = small_model(tokenizer.vocab_size, **change)
        model.dtype = torch.bfloat16
        _, tuned = tune(model, examples, tokenizer, settings)
        assert tuned.losses_by_epoch[-1] < tuned.losses_by_epoch[0], change
        assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}


def test_saved_adapters_restore_the_same_model(tokenizer, examples, tmp_path):
    model = small_model(tokenizer.vocab_size)
    adapted, _ = tune(model, examples, tokenizer)
    save_adapters(adapted, tmp_path / "kept" / "adapters")
    found = sorted(path.name for path in (tmp_path / "kept" / "adapters").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors"]
    described = json.loads((tmp_path / "kept" / "adapters" / "adapter_config.json").read_text())
    assert described["r"] == 4
    again = small_model(tokenizer.vocab_size).eval()
    described["task_type"] = None  # our model lacks the generate method of transformers models
    (tmp_path / "kept" / "adapters" / "adapter_config.json").write_text(json.dumps(described))
    peft.PeftModel.from_pretrained(again, tmp_path / "kept" / "adapters")
    assert torch.equal(hidden(again, examples, tokenizer), hidden(model, examples, tokenizer))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        save_adapters(adapted, tmp_path / "kept" / "adapters")


def test_a_failed_save_leaves_no_folder(tokenizer, tmp_path, monkeypatch):
    adapted = add_adapters(small_model(tokenizer.vocab_size), FAST)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(fine_tuning, "write_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapters(adapted, tmp_path / "adapters")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(tokenizer, examples, monkeypatch):
    for name, value, message in [
        ("rank", 0, "rank is 0: give 1 or more"),
        ("epochs", 0, "epochs is 0"),
        ("batch_size", -1, "batch_size is -1"),
        ("alpha", 0.0, "alpha is 0.0: give a number above 0"),
        ("learning_rate", math.inf, "learning_rate is inf"),
        ("learning_rate", math.nan, "learning_rate is nan"),
        ("dropout", 1.0, "dropout is 1.0: give a number from 0 to below 1"),
        ("modules", (), "modules is empty"),
    ]:
        with pytest.raises(FineTuningError, match=message):
            LoraSettings(**{name: value})
    model = small_model(tokenizer.vocab_size)
    with pytest.raises(FineTuningError, match=r"no module 'q' to tune: choose of k_proj, o_proj, q_proj, v_proj"):
        add_adapters(model, replace(FAST, modules=("q",)))
    add_adapters(model, FAST)
    with pytest.raises(FineTuningError, match="has adapters already"):
        add_adapters(model, FAST)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FineTuningError, match="the loss of step 1 is nan: lower the learning rate"):
        fine_tune(model, examples, FAST, tokenizer.end_id, 10_000)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FineTuningError, match=r"needs peft .*: pip install 'moetrain\[instruct\]'"):
        add_adapters(small_model(tokenizer.vocab_size), FAST)
