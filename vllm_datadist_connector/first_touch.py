"""Huge pages under the KV cache from its first touch on: what vLLM's allocation of it happens in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_datadist_connector import _native

logger = logging.getLogger(__name__)


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
        tensor.detach().zero_()
        if advised:
            seconds = time.monotonic() - start
            logger.info(
                "huge pages were asked for before %.2f GiB were zeroed (%.2f s)", tensor.nbytes / 2**30, seconds
            )
        return tensor
