"""Hypothesis: no deadline per example, because other processes share the machine; a hang is the test run's to end."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
