"""What peers and clients make us say: one line each, and not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

MOST_PER_INTERVAL = 20
INTERVAL_S = 60.0
MAX_LINE = 2048


class OthersWords(logging.Filter):
    """For loggers whose records quote others.

    Of one kind (one format string), so many records pass in an interval; the first of a later one says how many did
    not. Each is one printable line, cut at its end.
    """

    def __init__(
        self,
        most: int = MOST_PER_INTERVAL,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._most = most
        self._interval_s = interval_s
        self._clock = clock
        self._kinds: dict[object, tuple[float, int]] = {}
        """By format string, which are ours and therefore few: when its interval began, and how many came in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        began, count = self._kinds.get(record.msg, (now, 0))
        left_out = 0
        if now - began >= self._interval_s:
            left_out = max(0, count - self._most)
            began, count = now, 0
        self._kinds[record.msg] = began, count + 1
        if count >= self._most:
            return False
        line = "".join(each if each.isprintable() else " " for each in record.getMessage())
        line = line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..."
        record.msg, record.args = f"{line} (and {left_out} more like it before)" if left_out else line, None
        return True
