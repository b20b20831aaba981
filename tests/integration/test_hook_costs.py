"""What the scheduler's hooks cost beside NixlConnector's: in proportion, because times are the machine's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOOKS = Path(__file__).resolve().parents[2] / "benchmarks" / "hooks.py"
ENOUGH_ROUNDS = 60
"""For a median that holds on a busy machine."""


def test_no_hook_has_become_dear_or_grows_with_leases() -> None:
    command = [sys.executable, str(HOOKS), "--check", "--rounds", str(ENOUGH_ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    problems = [line for line in done.stderr.splitlines() if line.startswith("out of bounds")]
    assert (done.returncode, problems) == (0, []), f"{done.stdout}{done.stderr}"
