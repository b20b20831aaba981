"""The work of transfer_cache_async: layer by layer in a thread of its own, as each layer becomes ready."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import LLMStatusCode, to_status_code
from vllm_datadist_connector.llm_datadist.utils.log import get_logger
from vllm_datadist_connector.llm_datadist.utils.utils import check_uint32
from vllm_datadist_connector.llm_datadist.v2.transfer_configs import LayerSynchronizer


class LayerPush(Protocol):
    """What one config asks for."""

    @property
    def layers(self) -> range:
        """Layers of the source cache."""

    @property
    def destination(self) -> str:
        """For the log."""

    def push(self, layer: int) -> int:
        """Pushes one of the layers now; native status."""


class CacheTask:
    """A running transfer_cache_async (LLM-DataDist Python: CacheTask).

    Its thread is not a daemon: the interpreter waits at exit until the layers are pushed or one of them fails, so a
    LayerSynchronizer that never returns keeps the process.
    """

    def __init__(
        self,
        num_layers: int,
        synchronizer: LayerSynchronizer,
        pushes: Sequence[LayerPush],
        unfinished: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT,
    ) -> None:
        self._num_layers = num_layers
        self._synchronizer = synchronizer
        self._pushes = tuple(pushes)
        self._unfinished = unfinished
        # Written by the thread alone, and read once it has ended.
        self._results: list[LLMStatusCode | None] = [None] * len(self._pushes)
        self._crashed = False
        self._thread = threading.Thread(target=self._run, name="datadist-layers")

    def start(self) -> None:
        """Called once, by the manager."""
        self._thread.start()

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Waits at most so long (uint32 ms; None: until the end): LLM_SUCCESS, or what the first failed config got.

        LLM_TIMEOUT (legacy manager: LLM_WAIT_PROCESS_TIMEOUT) if the task still runs. LLM_FAILED if the synchronizer
        raised, which the log shows.
        """
        if not self._has_ended(timeout_in_millis):
            return self._unfinished
        if self._crashed:
            return LLMStatusCode.LLM_FAILED
        failures = (result for result in self._results if result not in (None, LLMStatusCode.LLM_SUCCESS))
        return next(failures, None) or LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """Waits as synchronize; one result per config: its code, or None if the task ended before the config did.

        All are LLM_TIMEOUT (legacy manager: LLM_WAIT_PROCESS_TIMEOUT) if the task still runs.
        """
        if not self._has_ended(timeout_in_millis):
            return [self._unfinished] * len(self._results)
        return list(self._results)

    def wait_unless_own_thread(self) -> None:
        """For the manager's end, which a synchronizer may cause from the task's own thread."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _has_ended(self, timeout_in_millis: int | None) -> bool:
        if timeout_in_millis is not None:
            check_uint32("timeout_in_millis", timeout_in_millis)
        self._thread.join(None if timeout_in_millis is None else timeout_in_millis / 1000)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for layer in range(self._num_layers):
                due = [index for index, push in enumerate(self._pushes) if layer in push.layers]
                if due and not self._push_layer(layer, due):
                    return
        except Exception:
            self._crashed = True
            get_logger().exception("transfer_cache_async ended: an exception in the layer synchronizer or a push")

    def _push_layer(self, layer: int, due: Sequence[int]) -> bool:
        """False once something failed: nothing more is pushed then."""
        if not self._synchronizer.synchronize_layer(layer, None):
            for index in due:
                self._results[index] = LLMStatusCode.LLM_PARAM_INVALID
            get_logger().error("transfer_cache_async ended: synchronize_layer(%d) returned False", layer)
            return False
        for index in due:
            push = self._pushes[index]
            status = push.push(layer)
            if status != LLMStatusCode.LLM_SUCCESS:
                self._results[index] = to_status_code(status)
                get_logger().error(
                    "transfer_cache_async ended: layer %d to %s: %s (0x%08X), %s",
                    layer,
                    push.destination,
                    self._results[index],
                    status,
                    _native.last_error(),
                )
                return False
            if layer == push.layers[-1]:
                self._results[index] = LLMStatusCode.LLM_SUCCESS
        return True
