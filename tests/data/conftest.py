import pytest


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """`datasets` caches folders in a temporary folder, not in the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
