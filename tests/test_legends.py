"""Every letter of a shape suffix, as in `logits_BTV`, is explained in the docstring of its file."""

import ast
import pathlib
import re

import pytest

from tests import source as source_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("molmo2_jax", "data_pipelines", "launch")
SUFFIX = re.compile(r"[a-z0-9]_([A-Z][A-Za-z0-9]*)$")


def unexplained(source):
    """Returns {letter: a name that carries it} of the letters that the docstring of a module leaves out."""
    tree = source_lib.tree(source)
    words = set(re.findall(r"\b[A-Za-z]\b", ast.get_docstring(tree) or ""))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    found = {}
    for name in sorted(names):
        suffix = SUFFIX.search(name)
        if suffix and not name.isupper():
            found |= {letter: name for letter in suffix[1] if letter.isalpha() and letter not in words}
    return found


@pytest.mark.parametrize("path", sorted(
    str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")))
def test_the_letters_of_suffixes_are_in_the_legend(path):
    assert not unexplained((ROOT / path).read_text(encoding="utf-8"))


def test_a_letter_without_an_explanation_is_found():
    assert unexplained('"""B batch."""\ndef f(x_BT): return x_BT') == {"T": "x_BT"}
    assert not unexplained('"""B batch, T positions."""\ndef f(x_BT, MAX_ROWS): return x_BT')
