"""Roster: the system of record for users and their posts."""

__version__ = "0.1.0"
