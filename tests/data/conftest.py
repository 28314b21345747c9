import random

import pytest

from moetrain.data.tokenizer import train_tokenizer
from tests.conftest import sentences, sums


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """`datasets` caches folders in a temporary folder, not in the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def texts():
    """Texts of a few hundred characters."""
    rng = random.Random(0)
    return [f"{number}. {sentences(rng, rng.randint(1, 9))} {sums(rng, 3)}" for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """A tokenizer of these texts, and its file as ``path``."""
    made = train_tokenizer(texts, 320)
    made.path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    made.save(made.path)
    return made


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    """The token ids of these texts."""
    return tokenizer.encode_all(texts)
