"""Module names of the version before keep working, with a warning."""

import importlib
import sys

import pytest

from moetrain._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_new_module_with_a_warning(old):
    sys.modules.pop(f"moetrain.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"moetrain\.{old} has moved to moetrain\.{MOVED[old]}"):
        found = importlib.import_module(f"moetrain.{old}")
    new = importlib.import_module(f"moetrain.{MOVED[old]}")
    public = {name for name in vars(new) if not name.startswith("_")}
    assert public
    assert all(getattr(found, name) is getattr(new, name) for name in public)


def test_a_name_that_never_existed_is_no_module():
    with pytest.raises(ModuleNotFoundError, match=r"moetrain\.training\.nothing"):
        importlib.import_module("moetrain.training.nothing")
