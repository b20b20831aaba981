"""The logger LLM_DATADIST: to stdout, at the level that ASCEND_GLOBAL_LOG_LEVEL names when this is imported."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Final

LOGGER_NAME: Final = "LLM_DATADIST"
_LEVELS: Final = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}


def _make_logger() -> logging.Logger:
    logger = logging.getLogger(LOGGER_NAME)
    handler = logging.StreamHandler(sys.stdout)
    line = "[%(levelname)s] %(name)s(%(process)d,%(threadName)s):%(asctime)s %(place)s%(message)s"
    handler.setFormatter(logging.Formatter(line, defaults={"place": ""}))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS.get(os.environ.get("ASCEND_GLOBAL_LOG_LEVEL", ""), logging.ERROR))
    logger.propagate = False  # an application that logs to its root would show every line twice
    return logger


_LOGGER: Final = _make_logger()


def get_logger() -> logging.Logger:
    return _LOGGER


def _find_caller() -> str:
    """`[file:line]` of the nearest frame outside this module."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"[{Path(frame.f_code.co_filename).name}:{frame.f_lineno}]"


def _log(level: int, message: object, args: tuple[object, ...]) -> None:
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, message, *args, extra={"place": f"{_find_caller()} "})


def info(message: object, *args: object) -> None:
    """Logs `message % args` at INFO."""
    _log(logging.INFO, message, args)


def warn(message: object, *args: object) -> None:
    """Logs `message % args` at WARNING."""
    _log(logging.WARNING, message, args)


def error(message: object, *args: object) -> None:
    """Logs `message % args` at ERROR."""
    _log(logging.ERROR, message, args)
