"""Device: where a rank's KV cache lies, and when what was already asked of it has been done.

vLLM's steps run behind its scheduler: when a pull is ordered, kernels of earlier steps may still write into the very
blocks that it fills. A fence, taken on vLLM's thread when the order comes, passes when all of them have ended.

On P, too: a drafter may still write a prompt's KV when the first token, which ends the prefill, is known.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from vllm_datadist_connector import compat

_POLL_S = 0.0001


class Fence(Protocol):
    def has_passed(self) -> bool:
        """Never waits. True from some moment on."""


class Device(Protocol):
    def fence(self) -> Fence:
        """Of all work given to the device so far by the calling thread."""


class _Passed:
    def has_passed(self) -> bool:
        return True


PASSED = _Passed()


class HostDevice:
    """Kernels of the CPU have ended when the call returns that ran them."""

    def fence(self) -> Fence:
        return PASSED


class _StreamFence:
    def __init__(self, event: Any) -> None:
        self._event = event

    def has_passed(self) -> bool:
        # Asked, never waited for: to synchronise from another thread than vLLM's can hang a step.
        return bool(self._event.query())


class StreamDevice:
    """A device of torch with streams, such as torch.npu or torch.cuda."""

    def __init__(self, runtime: Any) -> None:
        """
        Args:
            runtime: what has its Event and current_stream().
        """
        self._runtime = runtime

    def fence(self) -> Fence:
        event = self._runtime.Event()
        event.record(self._runtime.current_stream())
        return _StreamFence(event)


def device_of(device_type: str) -> Device:
    """
    Args:
        device_type: of the KV cache's tensors, as torch names it.
    """
    if device_type == "cpu":
        return HostDevice()
    return StreamDevice(compat.streams(device_type))


def wait_for(fence: Fence, most_s: float) -> bool:
    """On vLLM's thread, where it has nothing else to do; False if the fence had not passed by then."""
    until = time.monotonic() + most_s
    while not fence.has_passed():
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)
    return True
