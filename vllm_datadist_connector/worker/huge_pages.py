"""Says in the log what came of the huge pages that the engine asks for in the background."""

from __future__ import annotations

import logging
import threading

from vllm_datadist_connector import _native

logger = logging.getLogger(__name__)

_GIB = 2**30


def log_when_done(datadist: _native.LlmDataDist) -> threading.Thread:
    """Starts a thread that waits for the engine's background work and logs what came of it; ends at finalize()."""

    def wait() -> None:
        _, report = datadist.wait_for_huge_pages()
        if report is None:
            return
        if not report.allowed:
            logger.info("no huge pages: /sys/kernel/mm/transparent_hugepage/enabled says never")
            return
        logger.info(
            "huge pages under %.2f of %.2f GiB in %.2f s", report.huge_bytes / _GIB, report.bytes / _GIB, report.seconds
        )

    thread = threading.Thread(target=wait, name="datadist-huge-pages", daemon=True)
    thread.start()
    return thread
