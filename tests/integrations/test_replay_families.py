"""A replay of a family that we have not, and a training that continues one that we have."""

import json
import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from moetrain.config import SettingsError, load_settings
from moetrain.data.tokenizer import load_tokenizer, train_tokenizer
from moetrain.data.tokenizer_export import write_tokenizer
from moetrain.routing.panel import HELDOUT, SEEN
from moetrain.routing.store import read_readings
from moetrain.training.initialize import initial_model
from tests.conftest import sentences, sums
from tests.integrations.tiny import tiny_model
from tests.tools.test_prepare_data import load_tool
from tests.tools.test_replay import pieces_of, write_documents

replay = load_tool("replay")
VOCABULARY = 320


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    rng = random.Random(9)
    written = {name: [write(rng, 12) for _ in range(60)] for name, write in (("stories", sentences), ("sums", sums))}
    tokenizer = train_tokenizer([text for texts in written.values() for text in texts], VOCABULARY)
    write_documents(folder, written, samples=6)
    return folder, tokenizer, written


def test_checkpoints_of_mixtral_are_replayed_through_transformers(documents, tmp_path):
    folder, tokenizer, written = documents
    models = {}
    for number, step in enumerate((5, 10)):
        name = folder / f"mixtral-step{step}"
        models[step] = tiny_model("mixtral", seed=number, vocab_size=VOCABULARY + 32)
        models[step].save_pretrained(name)
        write_tokenizer(tokenizer, name, 64)
    data = ["--data", str(folder / "met.yaml"), "--unseen", str(folder / "unseen.yaml")]
    given = [str(folder / f"mixtral-step{step}") for step in models]
    assert replay.main([*given, *data, "--output", str(tmp_path / "replay")]) == 0
    readings = list(read_readings(tmp_path / "replay"))
    assert [reading.step for reading in readings] == [5, 10]
    pieces = pieces_of(tokenizer, written)
    tokens = torch.tensor([ids for _, ids in pieces])
    for reading, model in zip(readings, models.values(), strict=True):
        with torch.no_grad():
            output = model(input_ids=tokens, output_router_logits=True)
        probs = torch.stack(output.router_logits).softmax(-1).view(3, len(tokens), 17, 8)[:, :, 1:].mean(2)
        loss = -output.logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].mean(1).numpy()
        for cell in (SEEN, HELDOUT):
            assert all(((reading.cell == cell) & (reading.domain == domain)).sum() == 6 for domain in written)
        for place in range(len(reading.cell)):
            nearest = int(np.abs(loss - reading.loss[place]).argmin())
            assert loss[nearest] == pytest.approx(reading.loss[place], abs=1e-5)
            assert pieces[nearest][0] == reading.domain[place]
            assert np.abs(probs[:, nearest].numpy() - reading.weights[place]).max() < 1e-3  # float16 on disk
    summary = json.loads((tmp_path / "replay" / "summary.json").read_text())
    assert "pathway/cosine" in summary["domains"]["sums"]["metrics"]


def test_another_number_of_experts_is_told(documents, tmp_path, capsys):
    folder, tokenizer, _ = documents
    for step, experts in ((1, 8), (2, 4)):
        name = tmp_path / f"other-step{step}"
        tiny_model(
            "mixtral", vocab_size=VOCABULARY + 32, num_experts=experts, num_local_experts=experts
        ).save_pretrained(name)
        write_tokenizer(tokenizer, name, 64)
    given = [str(tmp_path / f"other-step{step}") for step in (1, 2)]
    assert replay.main([*given, "--data", str(folder / "met.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "3 layers of 4 experts" in " ".join(capsys.readouterr().err.split())


def test_a_training_continues_a_qwen3(documents, tmp_path):
    _, tokenizer, _ = documents
    model = tiny_model("qwen3_moe", vocab_size=VOCABULARY + 32, head_dim=16)
    model.save_pretrained(tmp_path / "qwen")
    write_tokenizer(tokenizer, tmp_path / "qwen", 64)
    file = tmp_path / "qwen" / "tokenizer.json"
    given = [f"model.initialize_from={tmp_path / 'qwen'}", f"tokenizer.model={file}", "data.domains.a.path=x"]
    with pytest.raises(SettingsError, match="is a model of other settings: set ") as error:
        initial_model(load_settings(None, given), load_tokenizer(file), torch.float32)
    remedy = str(error.value).partition(": set ")[2].split()
    assert "model.qk_norm=head" in remedy
    assert "model.head_dim=16" in remedy
    ours = initial_model(load_settings(None, [*given, *remedy]), load_tokenizer(file), torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
