"""Settings that were changed and have no effect beside the others are named."""

from fnmatch import fnmatchcase

import pytest
import torch

from moetrain.config import describe_settings, load_settings, unused, unused_settings
from moetrain.distributed.mesh import ParallelLayout
from moetrain.loggers.preview import layout_line
from moetrain.models.transformer import Transformer
from moetrain.train import train

CODE = "data.domains.code.builtin=code"
TEXT = "data.domains.text.path=x.jsonl"
DENSE = "model.experts=dense"


@pytest.mark.parametrize(
    ("without", "line", "with_effect"),
    [
        (["model.dense_experts=8"], "model.dense_experts: no effect without model.experts=dense", [DENSE]),
        (["profile.steps=5"], "profile.steps: no effect without profile.start", ["profile.start=3"]),
        (
            [DENSE, "model.balancing=none", "model.router_z_loss_coef=0.1", "guard.dead_steps=5"],
            "model.balancing, model.router_z_loss_coef, guard.dead_steps: no effect with model.experts=dense, which "
            "has no router",
            ["model.experts=loop"],
        ),
        (
            [DENSE, "panel.samples=9", "monitor.window=9", "data.domains.code.eps=0.5", "monitor.exposure_window=9"],
            "data.domains.code.eps, monitor.window, panel.samples: no effect with model.experts=dense and without "
            "model.dense_experts",
            ["model.dense_experts=8"],
        ),
        (
            ["monitor.enabled=false", "phase.trend=4", "monitor.exposure_window=9"],
            "monitor.exposure_window, phase.trend: no effect with monitor.enabled=false",
            ["monitor.enabled=true"],
        ),
        (
            ["model.balancing=bias", "model.router_aux_loss_coef=0.1"],
            "model.router_aux_loss_coef: no effect without model.balancing=aux",
            ["model.balancing=aux"],
        ),
        (
            ["model.bias_update_rate=0.1"],
            "model.bias_update_rate: no effect without model.balancing=bias",
            ["model.balancing=bias"],
        ),
        (
            ["model.balancing=none", "model.balance_scope=micro_batch"],
            "model.balance_scope: no effect with model.balancing=none",
            ["model.balancing=bias"],
        ),
        (
            ["model.initialize_from=a/b", "model.initializer_range=0.1"],
            "model.initializer_range: no effect with model.initialize_from",
            ["model.initialize_from=null"],
        ),
        (["optim.momentum=0.9"], "optim.momentum: no effect without optim.name=muon", ["optim.name=muon"]),
        (["optim.decay_share=0.3"], "optim.decay_share: no effect without optim.schedule=wsd", ["optim.schedule=wsd"]),
        (
            ["optim.schedule=constant", "optim.min_learning_rate_ratio=0"],
            "optim.min_learning_rate_ratio: no effect with optim.schedule=constant",
            ["optim.schedule=wsd"],
        ),
        (
            ["tokenizer.model=t.json", "tokenizer.vocab_size=512"],
            "tokenizer.vocab_size: no effect with tokenizer.model, of which no more is trained",
            ["tokenizer.model=null"],
        ),
        (["tokenizer.lossy=true"], "tokenizer.lossy: no effect without tokenizer.model", ["tokenizer.model=t.json"]),
        (
            ["data.least_worth=0.5"],
            "data.least_worth: no effect without data.domains.NAME.repeats=auto",
            ["data.domains.code.repeats=auto"],
        ),
        (
            ["data.domains.code.most_repeats=4"],
            "data.domains.code.most_repeats: no effect without data.domains.code.repeats=auto",
            ["data.domains.code.repeats=auto"],
        ),
        (
            ["panel.repeat_every=2"],
            "panel.repeat_every: no effect without data.domains.NAME.repeats",
            ["data.domains.code.repeats=3"],
        ),
        (
            ["monitor.budget=auto", "panel.readings=20", "probes.readings=20"],
            "panel.readings, probes.readings: no effect with monitor.budget=auto, which chooses the number",
            ["monitor.budget=fixed"],
        ),
        (
            ["probes.builtin=false", "probes.items=10", "probes.trained_items=3"],
            "probes.items, probes.trained_items: no effect without probes.tasks, or probes of a built-in domain",
            ["probes.builtin=true"],
        ),
        (
            ["probes.builtin=false", "probes.tasks=[a.jsonl]", "probes.trained_items=3"],
            "probes.trained_items: no effect with probes.builtin=false",
            ["probes.builtin=true"],
        ),
        (
            ["probes.max_new_tokens=8"],
            "probes.max_new_tokens: no effect without probes.generate=true",
            ["probes.generate=true"],
        ),
        (
            ["data.domains.code.text_field=body"],
            "data.domains.code.text_field: no effect on a built-in domain, which has no fields",
            ["data.domains.code.builtin=null", "data.domains.code.path=x.jsonl"],
        ),
    ],
)
def test_a_setting_without_effect_is_named_with_what_it_would_need(without, line, with_effect):
    assert list(unused_settings(load_settings(None, [CODE, TEXT, *without]))) == [line]
    assert list(unused_settings(load_settings(None, [CODE, TEXT, *without, *with_effect]))) == []


@pytest.mark.parametrize(
    "words", [(), ("panel.repeat_every=0",), ("model.balancing=none", "model.router_aux_loss_coef=0")]
)
def test_a_default_and_what_is_switched_off_are_not_named(words):
    assert list(unused_settings(load_settings(None, [CODE, *words]))) == []


def test_every_rule_is_about_a_setting():
    known = [setting.key for setting in describe_settings()]
    for pattern in {key for rule in unused._RULES for key in rule.keys}:
        assert any(fnmatchcase(key, pattern) for key in known), pattern


def test_they_are_printed_before_the_run(make_settings, capsys):
    assert train(make_settings("profile.steps=5", "train.max_steps=1"), check=True) == 0
    assert capsys.readouterr().out.splitlines()[0] == "profile.steps: no effect without profile.start"


@pytest.mark.parametrize(
    ("sharding", "line"),
    [
        ("fsdp", "train.sharding=fsdp: no effect with one rank"),
        ("hybrid", "train.sharding=hybrid: no effect with one rank on each machine"),
        ("none", None),
    ],
)
def test_sharding_of_one_rank_is_named(make_settings, sharding, line):
    settings = make_settings(f"train.sharding={sharding}")
    model = Transformer(settings.model, 320, torch.float32)
    assert layout_line(model, ParallelLayout(), settings) == line
