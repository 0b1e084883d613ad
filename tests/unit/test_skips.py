"""The lists of tests that can't run through a pooler or on Citus."""

import ast
from pathlib import Path

import pytest

from tests.support import citus_skips, pooler_skips

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "reason"), [*pooler_skips.SKIPS.items(), *citus_skips.SKIPS.items()])
def test_names_an_existing_test(name: str, reason: str) -> None:
    """A test that is renamed would be run, and one that is gone needs no reason."""
    path, _, test = name.partition("::")
    module = ast.parse((CHECKOUT / path).read_text())
    functions = [node for node in module.body if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef)]
    assert test in {function.name for function in functions}
    assert reason
