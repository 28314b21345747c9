"""The stream of a run that went on with other data: what was trained on stays, and nothing comes twice."""

import numpy as np
import pytest

from moetrain.config import DataSettings, SettingsError
from moetrain.data.corpus import prepare_corpus
from moetrain.data.errors import DataError
from moetrain.data.stages import _after, stages
from moetrain.data.stream import training_stream

REPEATED = ("data.domains.sums.repeats=3", "train.max_steps=null")


def stream_of(make_settings, *overrides):
    settings = make_settings(*REPEATED, *overrides)
    return training_stream(prepare_corpus(settings), settings)


def earlier(steps, **changes):
    stage = {"steps": steps, "planned": 30, "domains": ["stories", "sums"]} | changes
    return "data.earlier=" + str([stage]).replace("'", '"').replace("None", "null")


def test_with_the_same_data_the_stream_is_the_same(make_settings):
    once, staged = stream_of(make_settings), stream_of(make_settings, earlier(6))
    assert staged.rows.samples.tolist() == once.rows.samples.tolist()
    assert staged.rows.starts.tolist() == once.rows.starts.tolist()
    assert [stage.begin for stage, _ in staged.stages] == [0, 6]


def test_other_weights_change_what_follows_and_nothing_before(make_settings):
    weights = ("data.mixture=weights", "data.domains.stories.weight=3", "data.domains.sums.weight=1")
    once, staged = stream_of(make_settings), stream_of(make_settings, *weights, earlier(6))
    assert staged.trained(6).tolist() == once.trained(6).tolist()
    assert len(np.unique(staged.rows.samples)) == len(staged.rows.samples)
    assert staged.exposures[staged.trained(6)].tolist() == once.exposures[once.trained(6)].tolist()
    rest = staged.rows.samples[len(staged.trained(6)) :]
    tokens = np.bincount(staged.samples.domain[rest], weights=staged.samples.row_lengths[rest])
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.02)
    assert staged.most_samples >= once.most_samples  # places in the stream only grow
    filled = staged.samples.row_lengths[rest].sum() / (64 * (len(staged.rows) - 6 * 16))
    assert filled > 0.97


def test_repeats_that_were_stopped_stay_out(make_settings):
    stopped = stream_of(make_settings)
    stopped.stop_repeats([1], 4)
    same = stream_of(make_settings, earlier(6, stops=[[4, [1]]]))
    assert same.rows.samples.tolist() == stopped.rows.samples.tolist()
    weights = ("data.mixture=weights", "data.domains.stories.weight=1", "data.domains.sums.weight=1")
    staged = stream_of(make_settings, *weights, earlier(6, stops=[[4, [1]]]))
    assert staged.trained(6).tolist() == stopped.trained(6).tolist()
    later = staged.rows.samples[len(staged.trained(6)) :]
    own = later[staged.samples.domain[later] == 1]
    texts = staged.text_of_sample
    assert len(own) == len(np.unique(texts[own])) > 0
    assert not np.isin(texts[own], texts[staged.trained(6)]).any()


def test_a_weight_without_text_left_is_told(make_settings):
    few = ("data.domains.sums.limit=60", "data.domains.sums.repeats=1")
    weights = ("data.mixture=weights", "data.domains.stories.weight=1", "data.domains.sums.weight=1")
    only = {"steps": 5, "planned": 5, "domains": ["stories", "sums"], "mixture": "weights", "weights": {"sums": 1.0}}
    with pytest.raises(
        DataError, match=r"data\.domains\.sums: the run has trained on all of its text.*leave it out by"
    ):
        stream_of(make_settings, *few, *weights, earlier(**only), "train.batch_rows=32")


def test_phases_begin_where_the_stage_does():
    phases = [(0, [1.0, 0.0]), (100, [0.5, 0.5]), (300, [0.0, 1.0])]
    assert _after(phases, 0) == phases
    assert _after(phases, 100) == [(0, [0.5, 0.5]), (200, [0.0, 1.0])]
    assert _after(phases, 1000) == [(0, [0.0, 1.0])]


def test_stages_that_do_not_fit_the_domains_are_refused(make_settings):
    assert len(stages(make_settings().data)) == 1
    for wrong in (["sums", "stories"], ["stories", "other"]):
        with pytest.raises(SettingsError, match=r"earlier: its stages do not fit the domains: leave it out"):
            make_settings(earlier(6, domains=wrong))
    two = [{"steps": steps, "planned": 9, "domains": ["a"]} for steps in (6, 5)]
    with pytest.raises(ValueError, match="do not fit"):
        DataSettings.model_validate({"domains": {"a": {"builtin": "code"}}, "earlier": two})
