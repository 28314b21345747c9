"""Two processes of Trainer (DDP) against one: the same global batches, so the same readings."""

import os
import subprocess
import sys

import numpy as np
import pytest

import moetrain
from moetrain.routing.store import read_readings
from tests.distributed.ranks import free_port

pytest.importorskip("transformers")


def run(folder, ranks, batch):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher += [] if ranks == 1 else ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, *launcher, "-m", "tests.integrations.ddp_training", str(folder), str(batch)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "monitor"


def test_two_ranks_read_what_one_does(tmp_path):
    one, two = run(tmp_path / "one", 1, 8), run(tmp_path / "two", 2, 4)
    pairs = list(zip(read_readings(one), read_readings(two), strict=True))
    assert [reading.step for reading, _ in pairs] == [0, 2, 4, 6]
    for alone, together in pairs:
        assert alone.training_context.tokens == together.training_context.tokens
        for name in ("document", "cell", "first_step"):
            assert np.array_equal(getattr(alone, name), getattr(together, name)), name
        assert np.allclose(alone.loss, together.loss, atol=1e-3)
        assert np.allclose(alone.weights, together.weights, atol=2e-3)
    curves = [moetrain.open_run(each).curve("stream/spread/noise") for each in (one, two)]
    assert len(curves[0]) > 0
    assert curves[0]["step"].tolist() == curves[1]["step"].tolist()
    assert np.allclose(curves[0]["value"], curves[1]["value"], rtol=0.02)
    assert not (tmp_path / "two" / "monitor-2").exists()
