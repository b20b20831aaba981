"""What others make us log is bounded in number and length, and stays one line."""

from __future__ import annotations

import logging

import pytest
from support.clock import Clock

from vllm_datadist_connector.log_filter import MAX_LINE, OthersWords
from vllm_datadist_connector.scheduler import adapters, local_prefills, producer
from vllm_datadist_connector.worker import driver, peers


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logger(clock: Clock) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addFilter(OthersWords(most=3, interval_s=60.0, clock=clock))
    return logger


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines(logger: logging.Logger) -> list[str]:
    handler = Lines()
    logger.addHandler(handler)
    return handler.lines


def test_a_kind_is_bounded_in_each_interval(logger: logging.Logger, lines: list[str], clock: Clock) -> None:
    for number in range(1000):
        logger.warning("refused: %d", number)
    logger.warning("another kind: %d", 1)
    assert lines == ["refused: 0", "refused: 1", "refused: 2", "another kind: 1"]
    clock.now += 60.0
    logger.warning("refused: %d", 1000)
    logger.warning("refused: %d", 1001)
    assert lines[4:] == ["refused: 1000 (and 997 more like it before)", "refused: 1001"]


def test_a_record_is_one_printable_line(logger: logging.Logger, lines: list[str]) -> None:
    logger.warning("peer says %s", "a\nWARNING forged\r\x1b[31m\u2028\u202etxt\ud800")
    (line,) = lines
    assert line.isprintable()
    assert line.startswith("peer says a WARNING forged")


def test_a_record_is_cut(logger: logging.Logger, lines: list[str]) -> None:
    logger.warning("peer says %s", "x" * 10_000)
    assert len(lines[0]) == MAX_LINE
    assert lines[0].endswith("...")


@pytest.mark.parametrize("module", [adapters, driver, local_prefills, peers, producer])
def test_who_quotes_others_uses_it(module: object) -> None:
    filters = module.logger.filters  # type: ignore[attr-defined]
    assert any(isinstance(each, OthersWords) for each in filters)
