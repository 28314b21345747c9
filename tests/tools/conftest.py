"""Fixtures of the tests of tools."""

import pytest

from tests.conftest import small_run


@pytest.fixture
def config(corpus_folder, tmp_path, tmp_path_factory):
    """Command-line words for a small run."""
    (tmp_path / "small.yaml").write_text("run: {name: small}\n")
    return [str(tmp_path / "small.yaml"), *small_run(corpus_folder, tmp_path, tmp_path_factory.getbasetemp())]
