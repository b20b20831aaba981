"""Faults x phases x transports: one test per cell, and a healthy pair beside each that must not notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_cell import run_cell
from table import FAULTS, PHASES, RESTARTS, TRANSPORTS, Cell, every_cell, why_not
from trio import Trio, kind_of

CELLS = sorted((cell for cell in every_cell() if why_not(cell) is None), key=kind_of)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, trio_of: Callable[[Cell], Trio]) -> None:
    run_cell(trio_of(cell), cell)


def test_the_table_has_no_empty_cell() -> None:
    assert len(list(every_cell())) == len(FAULTS) * len(PHASES) * len(TRANSPORTS)
    for cell in every_cell():
        assert (cell in CELLS) != bool(why_not(cell)), cell


def test_restarts_of_each_transport() -> None:
    for transport in TRANSPORTS:
        assert RESTARTS * sum(cell.fault == "restart" and cell.transport == transport for cell in CELLS) >= 20
