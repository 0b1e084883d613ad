"""Histories that have failed, one JSON file each, which the tests repeat."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "history"
# ROSTER_TEST_SEED repeats the random histories of an earlier run.
SEED = int(os.environ.get("ROSTER_TEST_SEED") or secrets.randbits(32))


def saved_histories(kind: str) -> list[Any]:
    """Return the saved histories of a kind, as parameters of a test."""
    files = sorted(FOLDER.glob(f"{kind}-*.json"))
    return [pytest.param(json.loads(file.read_text()), id=file.stem) for file in files]


@contextmanager
def save_if_failed(kind: str, history: dict[str, Any]) -> Iterator[None]:
    """Save a history that fails; of one seed the last, which is the smallest that hypothesis finds."""
    try:
        yield
    except Exception:
        FOLDER.mkdir(exist_ok=True)
        file = FOLDER / f"{kind}-{SEED}.json"
        file.write_text(json.dumps({"seed": SEED, **history}, indent=2) + "\n")
        raise
