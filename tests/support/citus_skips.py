"""Tests that can't run on Citus, with the reason of each."""

SKIPS: dict[str, str] = {}
