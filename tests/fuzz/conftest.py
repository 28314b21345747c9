import pytest


@pytest.fixture(scope="module")
def monkeypatch_module():
    """Only parse commands that would train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.train.train", lambda settings, check: 0)
        yield patch
