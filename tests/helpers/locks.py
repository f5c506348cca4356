"""Locks with short times."""

from axolotl_layersel.training import lock


def shorten_waits(monkeypatch) -> None:
    """Let a lock expire, be checked and be renewed after fractions of a second."""
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "POLL", 0.02)
    monkeypatch.setattr(lock, "BEAT", 0.05)
