"""The histories that ever failed: one JSON file each, so that they are tried again for good."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "history"
# ROSTER_TEST_SEED tries the random histories of an earlier run again.
SEED = int(os.environ.get("ROSTER_TEST_SEED") or secrets.randbits(32))


def kept(kind: str) -> list[Any]:
    """Return the histories of a kind, as parameters of a test."""
    files = sorted(FOLDER.glob(f"{kind}-*.json"))
    return [pytest.param(json.loads(file.read_text()), id=file.stem) for file in files]


@contextmanager
def keeping(kind: str, history: dict[str, Any]) -> Iterator[None]:
    """Keep a history that fails; of those of one seed the last, to which hypothesis shrinks them."""
    try:
        yield
    except Exception:
        FOLDER.mkdir(exist_ok=True)
        file = FOLDER / f"{kind}-{SEED}.json"
        file.write_text(json.dumps({"seed": SEED, **history}, indent=2) + "\n")
        raise
