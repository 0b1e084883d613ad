"""The list of tests that can't run through a pooler."""

import ast
from pathlib import Path

import pytest

from tests.support.pooler_skips import SKIPS

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SKIPS)
def test_names_an_existing_test(name: str) -> None:
    """A test that is renamed would be run, and one that is gone needs no reason."""
    path, _, test = name.partition("::")
    module = ast.parse((CHECKOUT / path).read_text())
    functions = [node for node in module.body if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)]
    assert test in {function.name for function in functions}
    assert SKIPS[name]
