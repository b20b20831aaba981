"""The table of faults x phases x transports: which cells there are, and why the others cannot be.

`local` is no column: its two ends are one process, which a fault stops, ends or starves as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TRANSPORTS = ("cma", "tcp")
PHASES = ("dial", "handshake", "describe", "pull", "push", "confirm", "idle", "unlink")
FAULTS = (
    "kill",
    "stop",
    "swallow answers",
    "swallow both",
    "reset",
    "slow",
    "restart",
    "descriptors",
    "memory",
    "fork",
    "exit",
)
PATIENT = ("kill", "reset", "restart", "fork", "exit")
"""Faults of which the caller hears at once, or never: a busy machine must not make a timeout of them."""
ON_THE_WIRE = ("swallow answers", "swallow both", "slow")
RESTARTS = 3
"""Of one cell: over its phases, more than twenty for each transport."""


@dataclass(frozen=True)
class Cell:
    fault: str
    phase: str
    transport: str

    def __str__(self) -> str:
        return f"{self.fault.replace(' ', '_')}-{self.phase}-{self.transport}"


def why_not(cell: Cell) -> str | None:
    """None: the cell can be, and there is a test of it."""
    if cell.phase == "pull" and cell.transport == "cma" and cell.fault in ON_THE_WIRE:
        return "no wire: the kernel copies"
    if cell.phase == "idle" and cell.fault == "exit":
        return "nothing is in flight"
    return None


def is_patient(cell: Cell) -> bool:
    return cell.fault in PATIENT


def every_cell() -> Iterator[Cell]:
    for transport in TRANSPORTS:
        for phase in PHASES:
            for fault in FAULTS:
                yield Cell(fault, phase, transport)


def rendered(passed: set[Cell], failed: set[Cell]) -> list[str]:
    """The table as lines of text: + passed, F failed, - cannot be, nothing where no test ran."""
    lines = []
    for transport in TRANSPORTS:
        lines.append(f"{transport:<16}" + "".join(f"{phase:>10}" for phase in PHASES))
        for fault in FAULTS:
            cells = [Cell(fault, phase, transport) for phase in PHASES]
            marks = ["F" if c in failed else "+" if c in passed else "-" if why_not(c) else " " for c in cells]
            lines.append(f"  {fault:<14}" + "".join(f"{mark:>10}" for mark in marks))
    reasons = sorted({f"{c.transport}, {c.phase} x {c.fault}: {why}" for c in every_cell() if (why := why_not(c))})
    return [*lines, *(f"- {reason}" for reason in reasons)]
