"""A sharded run gives what an unsharded one does, and its checkpoints can be resumed by any number of ranks."""

import shutil

import pytest
import torch

from moetrain.checkpoint.manager import checkpoint_folder, load_checkpoint
from moetrain.config import load_settings
from moetrain.train import train
from tests.conftest import small_run
from tests.distributed.mesh_of_one import check_training
from tests.distributed.ranks import launch
from tests.trainer.reading import assert_close, assert_same_scalars, scalars, states

STEPS = 8
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.micro_batch_rows=2",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=99",
    "train.activation_checkpointing=true",
    "model.balancing=bias",
    "model.tie_word_embeddings=true",
    "optim.learning_rate=0.003",
    "monitor.every=4",
)
# By name: machines, ranks on each, and the settings.
SHARDED = {
    "fsdp-2": (1, 2, ("train.sharding=fsdp",)),
    "fsdp-4": (1, 4, ("train.sharding=fsdp",)),
    "hybrid-2x2": (2, 2, ("train.sharding=hybrid",)),
    "expert-2": (1, 2, ("train.expert_parallel=2",)),
    "expert-4": (1, 4, ("train.expert_parallel=4",)),
    "expert-2-of-4": (1, 4, ("train.expert_parallel=2",)),
    "fsdp-4-expert-2": (1, 4, ("train.expert_parallel=2", "train.sharding=fsdp")),
    "hybrid-2x2-expert-2": (2, 2, ("train.expert_parallel=2", "train.sharding=hybrid")),
}
PLAIN = ("fsdp-2", "expert-2")
EACH = [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in SHARDED if name not in PLAIN)]


class Runs:
    """Runs by name, each trained when it is first needed."""

    def __init__(self, corpus, folder, cache):
        self.folder = folder
        self._base = [*small_run(corpus, folder, cache), *SETTINGS]
        self._done = {}
        (folder / "empty.yaml").write_text("")

    def overrides(self, name, *more):
        return [*self._base, f"run.name={name}", *more]

    def launch(self, machines, ranks, overrides):
        launch(ranks, [str(self.folder / "empty.yaml"), *overrides], machines)

    def one(self, *more):
        name = "one" + "".join(more).replace("=", "-")
        if name not in self._done:
            torch.set_num_threads(1)
            assert train(load_settings(None, self.overrides(name, *more))) == 0
            self._done[name] = self.folder / "runs" / name
        return self._done[name]

    def sharded(self, name, *more):
        machines, ranks, settings = SHARDED[name]
        called = name + "".join(more).replace("=", "-")
        if called not in self._done:
            self.launch(machines, ranks, self.overrides(called, *settings, *more))
            self._done[called] = self.folder / "runs" / called
        return self._done[called]


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory):
    return Runs(corpus_folder, tmp_path_factory.mktemp("sharding"), tmp_path_factory.getbasetemp())


MICRO_BATCHES = "train.micro_batch_rows=4"


def test_a_model_sharded_over_a_mesh_of_one_trains_like_a_whole_one(make_settings):
    check_training(make_settings(MICRO_BATCHES), make_settings(MICRO_BATCHES), 0, 0)


@pytest.mark.slow  # compiles
def test_so_does_a_compiled_one(make_settings):
    compiled = make_settings(MICRO_BATCHES, "train.compile=true")
    check_training(make_settings(MICRO_BATCHES), compiled, 1e-3, 1e-4)


@pytest.mark.parametrize("name", EACH)
def test_weights_and_moments_are_those_of_one_rank(runs, name):
    for step, tolerance in ((1, 1e-5), (STEPS, 1e-3)):
        actual, expected = (states(checkpoint_folder(run, step)) for run in (runs.sharded(name), runs.one()))
        assert_close(actual, expected, ("model/", "optimizer/", "balancing/"), tolerance)


@pytest.mark.parametrize("name", EACH)
def test_losses_and_metrics_are_those_of_one_rank(runs, name):
    actual, expected = scalars(runs.sharded(name)), scalars(runs.one())
    balance = [actual.pop(f"experts/rank_load_cv{which}", []) for which in ("", "/worst")]
    assert [len(each) for each in balance] == [len(expected["loss/train"]) if "expert" in name else 0] * 2
    assert {"loss/validation/sums", "loss/panel_seen/sums", "pathway/spread/sums", "loss/train"} <= actual.keys()
    assert_same_scalars(actual, expected)


@pytest.mark.parametrize("name", EACH)
def test_each_rank_writes_its_shards(runs, name):
    machines, ranks, _ = SHARDED[name]
    folder = checkpoint_folder(runs.sharded(name), STEPS)
    shards = ranks if name.startswith("hybrid") else machines * ranks
    for owner in ("model", "optimizer"):
        assert not (folder / f"{owner}.safetensors").exists()
        assert len(list((folder / owner).glob("shard-*.safetensors"))) >= shards
    sizes = [path.stat().st_size for path in (folder / "optimizer").iterdir()]
    assert max(sizes) < 0.7 * sum(sizes)


def test_a_corrupt_shard_is_named(runs, tmp_path):
    folder = shutil.copytree(checkpoint_folder(runs.sharded("fsdp-2"), STEPS), tmp_path / "step_00000008")
    path = sorted((folder / "optimizer").iterdir())[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"optimizer/{path.name}: corrupt"):
        load_checkpoint(folder)


def resumable(run, name, step):
    """A copy of a run, unfinished after a step."""
    copy = shutil.copytree(run, run.with_name(name))
    (copy / "summary.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize("name", PLAIN)
def test_one_rank_resumes_from_the_shards_of_two(runs, name):
    copy = resumable(runs.sharded(name), f"{name}-to-one", 5)
    assert train(load_settings(None, runs.overrides(f"{name}-to-one"))) == 0
    assert (checkpoint_folder(copy, STEPS) / "model.safetensors").is_file()
    actual, expected = (states(checkpoint_folder(run, STEPS)) for run in (copy, runs.one()))
    assert_close(actual, expected, ("model/", "optimizer/"), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "fsdp-2"),
        ("fsdp-2", "fsdp-4"),
        ("fsdp-4", "hybrid-2x2"),
        ("hybrid-2x2", "fsdp-2"),
        ("one", "expert-2"),
        ("expert-2", "expert-4"),
        ("expert-4", "fsdp-4-expert-2"),
        ("fsdp-4-expert-2", "fsdp-2"),
        ("fsdp-4", "expert-2-of-4"),
        ("hybrid-2x2-expert-2", "expert-2"),
    ],
)
def test_any_number_of_ranks_resumes_from_any_other(runs, before, after):
    name = f"{before}-to-{after}"
    copy = resumable(runs.one() if before == "one" else runs.sharded(before), name, 5)
    machines, ranks, settings = SHARDED[after]
    runs.launch(machines, ranks, runs.overrides(name, *settings))
    actual, expected = (states(checkpoint_folder(run, STEPS)) for run in (copy, runs.one()))
    assert_close(actual, expected, ("model/", "optimizer/"), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["train.precision=bf16", "optim.state_precision=bf16"])
def test_bf16_too(runs, more):
    """Weights are gathered in the dtype of the matmuls; moments kept in bf16 stay bf16."""
    actual, expected = (states(checkpoint_folder(run, 1)) for run in (runs.sharded("fsdp-2", more), runs.one(more)))
    wide = [{key: value.float() for key, value in each.items()} for each in (actual, expected)]
    assert_close(*wide, ("optimizer/",), 1e-4)
    losses = [[v for _, v in scalars(run)["loss/train"]] for run in (runs.sharded("fsdp-2", more), runs.one(more))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
