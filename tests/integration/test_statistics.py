"""What an endpoint says of its calls in the log when it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from vllm_datadist_connector._native import ManagedDataDist
datadist = ManagedDataDist(5, 3)
assert datadist.initialize({"llm.DeviceId": "0"}) == 0
assert datadist.pull_rows(9, 1, 1) != 0
datadist.finalize()
"""


@pytest.mark.parametrize(("level", "expected"), [("1", 1), ("2", 0), (None, 0)])
def test_calls_are_logged_at_the_end(level: str | None, expected: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ASCEND_GLOBAL_LOG_LEVEL"}
    if level is not None:
        environment["ASCEND_GLOBAL_LOG_LEVEL"] = level
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = re.findall(r"INFO cluster 5: pulls 1 \(1 failed, mean \d+ us, longest \d+ us\)$", done.stderr, re.MULTILINE)
    assert len(found) == expected, done.stderr
