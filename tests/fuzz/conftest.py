import pytest


@pytest.fixture(scope="module")
def monkeypatch_module():
    """Commands that would train do not: only their words are tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.train.train", lambda settings, check: 0)
        yield patch
