"""A minute of soak_run.py in every run; an hour or a night is for who starts it by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from soak_run import soak

SECONDS = 60.0
SEED = 1


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    report = soak(SECONDS, SEED)
    with capsys.disabled():
        print(f"\n{report}")
