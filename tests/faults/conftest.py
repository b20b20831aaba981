"""Three processes per kind of engine, kept from cell to cell, and the table at the end of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from table import Cell, rendered  # noqa: E402
from trio import Trio, TrioKind, kind_of  # noqa: E402

_CELLS = pytest.StashKey[dict[Cell, bool]]()
_FAILED = pytest.StashKey[bool]()


class _Trios:
    """One at a time: the cells are sorted by what they need."""

    def __init__(self) -> None:
        self._open: dict[TrioKind, Trio] = {}

    def of(self, cell: Cell) -> Trio:
        kind = kind_of(cell)
        if kind not in self._open:
            self.close()
            self._open[kind] = Trio(kind)
        return self._open[kind]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


@pytest.fixture(scope="module")
def trios() -> Iterator[_Trios]:
    trios = _Trios()
    yield trios
    trios.close()


@pytest.fixture
def trio_of(trios: _Trios, request: pytest.FixtureRequest) -> Iterator[Callable[[Cell], Trio]]:
    """A failed cell leaves its processes in any state: the next one has new ones."""
    yield trios.of
    if request.node.stash.get(_FAILED, False):
        trios.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cell = item.callspec.params.get("cell") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    if isinstance(cell, Cell) and report.when == "call":
        item.stash[_FAILED] = report.failed
        item.config.stash.setdefault(_CELLS, {})[cell] = report.passed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if cells := config.stash.get(_CELLS, {}):
        terminalreporter.section("faults x phases: + passed, F failed, - cannot be, blank not run")
        for line in rendered({c for c, ok in cells.items() if ok}, {c for c, ok in cells.items() if not ok}):
            terminalreporter.write_line(line)
