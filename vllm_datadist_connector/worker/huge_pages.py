"""Huge pages under the KV cache: asked for before it is first touched where vLLM lets us, in the background elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_datadist_connector import _native

logger = logging.getLogger(__name__)

_GIB = 2**30


class FirstTouch(TorchFunctionMode):
    """Context in which torch.zeros() asks for huge pages between allocating host memory and writing the zeros.

    Memory that was touched before has to be copied, huge page by huge page, while others wait for the lock of the
    process's memory map.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.zeros:
            return func(*args, **(kwargs or {}))
        start = time.monotonic()
        tensor = torch.empty(*args, **(kwargs or {}))
        advised = tensor.device.type == "cpu" and _native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
        tensor.zero_()
        if advised:
            seconds = time.monotonic() - start
            logger.info("huge pages were asked for before %.2f GiB were zeroed (%.2f s)", tensor.nbytes / _GIB, seconds)
        return tensor


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
