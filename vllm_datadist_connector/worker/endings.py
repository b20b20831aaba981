"""Endings: of queues whose native calls may never return.

Such a call must not hold up vLLM's shutdown for ever, and what it uses must outlive it: a device may still write into
the KV cache.
"""

from __future__ import annotations

import ctypes
import logging

from vllm_datadist_connector import _native

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""That a call may take beyond its own time limit."""


def end(queue: _native.TransferQueue, longest_s: float) -> bool:
    """Waits for its running calls, and closes it; False if one is out of its time: then it and its endpoint stay.

    Args:
        longest_s: time limit of its calls.
    """
    if queue.drain(longest_s + GRACE_S):
        queue.close()
        return True
    keep(queue)
    logger.critical(
        "a call of the provider's has not returned %.0f s after its time was up: its endpoint and the KV cache stay as"
        " they are, and may be written to, until this process has ended; kill it if it does not",
        GRACE_S,
    )
    return False


def keep(thing: object) -> None:
    """It is not freed as long as the process lives, not at the interpreter's end either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
