"""The built-in domain of functions of the standard library."""

import ast
import sysconfig
import textwrap

import pytest

from moetrain.data import builtin
from moetrain.data.builtin import python_functions

LONG = "    x = 'long enough to be a document of its own'\n" * 5
SOURCE = f'''import os

def top(a):
    """Text."""
{LONG}
class C:
    y = 1

    @property
    @other
    async def method(self):
{textwrap.indent(LONG, "    ")}
    class Inner:
        def too_deep(self):
{textwrap.indent(LONG, "        ")}
def short(a):
    return a

def huge(a):
{LONG * 20}'''


def test_functions_and_methods_are_documents_without_their_indentation():
    found = list(python_functions.functions(SOURCE))
    assert [text.splitlines()[0] for text in found] == ["def top(a):", "@property"]
    assert found[0] == f'def top(a):\n    """Text."""\n{LONG}'
    assert found[1] == f"@property\n@other\nasync def method(self):\n{LONG}"
    assert list(python_functions.functions(SOURCE.replace("\n", "\r\n"))) == found
    assert all(len(text) in python_functions.LENGTH for text in found)
    for broken in ("def broken(:\n", "nul \0", ""):
        assert list(python_functions.functions(broken)) == []


def test_a_larger_domain_begins_with_a_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for place in range(6):
        (tmp_path / f"m{place}.py").write_text(SOURCE.replace("top", f"top{place}"))
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    whole = list(builtin.documents("functions", size=10**9, seed=0))
    assert len(whole) == 12
    size = sum(len(text.encode()) for text in whole[:5])
    assert list(builtin.documents("functions", size=size, seed=0)) == whole[:5]
    assert list(builtin.documents("functions", size=size + 1, seed=0)) == whole[:6]
    other = list(builtin.documents("functions", size=10**9, seed=1))
    assert other != whole
    assert sorted(other) == sorted(whole)


def test_the_real_library_has_many_and_no_probes():
    texts = list(builtin.documents("functions", size=300_000, seed=0))
    assert len(texts) > 200
    assert all(len(ast.parse(text).body) == 1 for text in texts)
    assert builtin.probe_items("functions", items=9, seed=0) == []
    with pytest.raises(ValueError, match="takes no option"):
        builtin.documents("functions", size=1, seed=0, modulus=5)
    assert "functions 1 " in builtin.generator_fingerprint("functions")
