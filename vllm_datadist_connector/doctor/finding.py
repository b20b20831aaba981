"""What a check says, and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "wrong", "not_applicable"]

_WIDTH = 120
_MARGIN = " " * 9


@dataclass(frozen=True, slots=True)
class Finding:
    """`wrong`: an instance does not start, does not find its peer or gives wrong answers as things are."""

    name: str
    status: Status
    found: str
    do: str = ""
    """What helps; empty if nothing has to be done."""


def text_of(finding: Finding) -> Iterator[str]:
    shown = "-" if finding.status == "not_applicable" else finding.status
    yield from textwrap.wrap(
        f"{shown:<8} {finding.name}: {finding.found}",
        _WIDTH,
        subsequent_indent=_MARGIN,
        break_on_hyphens=False,
        break_long_words=False,
    )
    if finding.do:
        yield from textwrap.wrap(
            f"{_MARGIN}-> {finding.do}",
            _WIDTH,
            subsequent_indent=_MARGIN + "   ",
            break_on_hyphens=False,
            break_long_words=False,
        )


def summary_of(findings: Iterable[Finding]) -> str:
    statuses = [finding.status for finding in findings]
    wrong, warnings = statuses.count("wrong"), statuses.count("warning")
    if not wrong:
        return f"Nothing is wrong{f', {warnings} to be looked at' if warnings else ''}."
    return f"{wrong} wrong, {warnings} to be looked at."
