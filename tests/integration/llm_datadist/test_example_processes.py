"""The example scripts in Python, run in pairs by `python -m vllm_datadist_connector.llm_datadist`."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples" / "python"
PAIR_TIMEOUT_S = 300

# How many checks of memory and codes the two processes of a pair make.
CHECKS = {
    "pull_cache": 5,
    "pull_blocks": 4,
    "push_blocks": 5,
    "layer_by_layer": 3,
    "request_keys": 5,
    "bilateral_link": 6,
    "switch_role": 2,
}


@pytest.fixture
def addresses() -> tuple[str, str]:
    """Two addresses that nobody else uses: a loopback IP of this test's own, ports that no client is given."""
    host = ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])
    return f"{host}:26000", f"{host}:26001"


def run_pair(script: Path, addresses: tuple[str, str], meeting: Path) -> list[str]:
    """The outputs of prompt and decoder, which must end with 0."""
    command = [sys.executable, "-m", "vllm_datadist_connector.llm_datadist", str(script)]
    pair = [
        subprocess.Popen(
            [*command, role, *addresses, str(meeting)],
            cwd=meeting,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for role in ("prompt", "decoder")
    ]
    deadline = time.monotonic() + PAIR_TIMEOUT_S
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert [process.returncode for process in pair] == [0, 0], "\n-- decoder\n".join(outputs)
    return outputs


def test_every_script_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "pair"}


@pytest.mark.parametrize("example", CHECKS)
def test_pair(example: str, addresses: tuple[str, str], tmp_path: Path) -> None:
    outputs = run_pair(EXAMPLES / f"{example}.py", addresses, tmp_path)
    lines = [line for output in outputs for line in output.splitlines()]
    assert sum(line.endswith(": as expected") for line in lines) == CHECKS[example]
    assert len(lines) == CHECKS[example] + 2, lines  # "prompt: done", "decoder: done", and no word of the package
