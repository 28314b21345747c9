import shutil

import pytest
import torch

from moetrain.checkpoint.manager import CheckpointError, load_checkpoint
from moetrain.checkpoint.restore import open_model
from moetrain.config import load_settings
from moetrain.data.corpus import prepare_corpus
from moetrain.data.stream import training_stream
from moetrain.train import train
from tests.conftest import small_run
from tests.data.test_tokenizer_json import byte_level

SETTINGS = ("train.max_steps=6", "train.checkpoint_every=3", "model.balancing=bias", "panel.readings=2")


@pytest.fixture(scope="module")
def run(corpus_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("restored")
    cache = out / "cache"
    settings = load_settings(None, [*small_run(corpus_folder, out, cache), *SETTINGS])
    assert train(settings) == 0
    return out / "runs" / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_run_opens_at_its_newest_checkpoint_and_at_any_without_its_cache(run, tmp_path, copy):
    newest, older = open_model(copy), open_model(copy / "checkpoints" / "step_00000003", dtype=torch.float32)
    assert (newest.step, older.step) == (6, 3)
    assert newest.run == copy
    corpus = prepare_corpus(newest.settings)
    assert newest.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert not newest.model.training
    for opened in (newest, older):
        saved = load_checkpoint(opened.checkpoint).states["model"]
        state = opened.model.state_dict()
        assert state.keys() == saved.keys()
        assert "model.layers.0.mlp.gate.selection_bias" in state
        assert all(torch.equal(state[name], saved[name]) for name in saved)
    batch = training_stream(corpus, newest.settings).batch(0, 0, 2)
    with torch.no_grad():
        losses = [float(opened.model(batch.model_input()).loss_sum) for opened in (newest, older)]
    assert losses[0] < losses[1]


def test_a_superseded_checkpoint_and_one_with_a_corrupt_optimizer_open(copy):
    (copy / "checkpoints" / "superseded").mkdir()
    superseded = (copy / "checkpoints" / "step_00000003").rename(copy / "checkpoints" / "superseded" / "step_00000003")
    assert open_model(superseded).step == 3
    (copy / "checkpoints" / "step_00000006" / "optimizer.safetensors").unlink()
    assert open_model(copy).step == 6


def test_tied_embeddings_stay_tied(corpus_folder, tmp_path, tmp_path_factory):
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    settings = load_settings(None, [*base, "train.max_steps=1", "model.tie_word_embeddings=true"])
    assert train(settings) == 0
    model = open_model(tmp_path / "runs" / "run").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_a_given_tokenizer_json_is_saved_with_its_marks(corpus_folder, tmp_path, tmp_path_factory):
    given = tmp_path / "tokenizer.json"
    byte_level(["<|x|>", "<|y|>"]).save(str(given))
    base = small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())
    named = [f"tokenizer.model={given}", "tokenizer.begin_token=<|y|>", "tokenizer.end_token=<|x|>"]
    assert train(load_settings(None, [*base, *named, "train.max_steps=1"])) == 0
    given.unlink()
    tokenizer = open_model(tmp_path / "runs" / "run").tokenizer
    assert (tokenizer.begin_id, tokenizer.end_id) == (1, 0)


@pytest.mark.parametrize(
    ("damage", "where", "said"),
    [
        (lambda run: None, "nowhere", "no such folder: give RUN or RUN/checkpoints/step_XXXXXXXX"),
        (lambda run: None, "routing", "no checkpoint here"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "", "no checkpoint here"),
        (lambda run: [shutil.rmtree(path) for path in (run / "checkpoints").iterdir()], "", "holds no checkpoint"),
        (lambda run: (run / "config.yaml").unlink(), "", "the run's config.yaml is missing"),
        (lambda run: (run / "tokenizer.model").unlink(), "", "the run's tokenizer is missing: copy"),
        (lambda run: (run / "tokenizer.model").write_bytes(b"x"), "", "the run's tokenizer cannot be used"),
        (
            lambda run: (run / "config.yaml").write_text(
                (run / "config.yaml").read_text().replace("num_experts: 8", "num_experts: 9")
            ),
            "",
            r"its weights do not fit .*experts.down_proj: found \(8, 32, 16\), .* require \(9, 32, 16\)",
        ),
        (
            lambda run: (run / "checkpoints/step_00000006/model.safetensors").unlink(),
            "checkpoints/step_00000006",
            "model.safetensors: missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line(copy, damage, where, said):
    damage(copy)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_model(copy / where)
    assert "\n" not in str(caught.value)
