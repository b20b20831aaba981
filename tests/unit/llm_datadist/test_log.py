"""The LLM_DATADIST logger: level from the environment, lines to stdout, with the caller's place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_datadist_connector.llm_datadist.utils import log

PROGRAM = """
from vllm_datadist_connector.llm_datadist.utils import log
log.get_logger().debug("a debug line")
log.info("an info line")
log.warn("a %s line", "warning")
log.error("100% an error line")
"""


def lines_at(level: str | None) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ASCEND_GLOBAL_LOG_LEVEL"}
    if level is not None:
        environment["ASCEND_GLOBAL_LOG_LEVEL"] = level
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("level", "count"), [("0", 4), ("1", 3), ("2", 2), ("3", 1), (None, 1), ("", 1), ("verbose", 1)]
)
def test_level(level: str | None, count: int) -> None:
    expected = ["a debug line", "an info line", "a warning line", "100% an error line"][-count:]
    lines = lines_at(level)
    assert len(lines) == count
    for line, text in zip(lines, expected, strict=True):
        assert line.endswith(text)
        assert "LLM_DATADIST" in line


def test_name_and_handler() -> None:
    program = (
        "import logging, sys\n"
        "from vllm_datadist_connector.llm_datadist.utils import log\n"
        "logger = logging.getLogger('LLM_DATADIST')\n"
        "assert log.get_logger() is logger\n"
        "assert [handler.stream for handler in logger.handlers] == [sys.stdout]\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "log.error('once')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("once") == 1


def test_place_of_the_caller() -> None:
    assert log._find_caller().startswith("[test_log.py:")
    assert "[<string>:6]" in lines_at("3")[0]
