"""Giving: what of a P rank's KV cache is final, told to the instance's side channel while the prefill goes on.

    hooks (vLLM's thread) ── a step begins, a layer is written, it ends ──> ProgressReporter (native) ──> side channel

A layer's hook is a hint: where none comes (layers that vLLM does not announce, captured graphs, devices that run behind
their host) the end of the step tells of all layers at once.
"""

from __future__ import annotations

from collections import deque

from vllm_datadist_connector.metadata import GivingStep
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.client import ProgressReporter
from vllm_datadist_connector.side_channel.endpoint import Trust
from vllm_datadist_connector.worker.device import Device, Fence
from vllm_datadist_connector.worker.progress import layer_bits


class Giving:
    """Belongs to vLLM's thread, and never waits."""

    def __init__(self, geometry: RankGeometry, trust: Trust, device: Device, is_announced: bool) -> None:
        """
        Args:
            is_announced: whether a layer is final when its hook is called.
        """
        self._bits = layer_bits(geometry) if is_announced else {}
        self._device = device
        self._trust = trust
        self._rank = geometry.pp_rank, geometry.tp_rank
        self._reporter: ProgressReporter | None = None
        self._seen: GivingStep | None = None
        self._step: GivingStep | None = None
        self._ended: deque[tuple[GivingStep, Fence]] = deque()

    def begin(self, step: GivingStep | None) -> None:
        """Before the step's forward pass; again for the same one is nothing."""
        if step is self._seen:
            return
        self.poll()
        self._seen = self._step = step
        if step is not None and self._bits:
            self._open().begin_step(step.endpoint, step.key, step.chunks)

    def layer(self, name: str) -> None:
        """That layer of the step is written."""
        if self._step is not None:
            for bit in self._bits.get(name, ()):
                self._open().layer(bit)

    def end(self) -> None:
        """All that the step writes was given to the device."""
        step, self._step = self._step, None
        if step is not None:
            self._ended.append((step, self._device.fence()))
            self.poll()

    def poll(self) -> None:
        """Tells of steps that the device has done."""
        while self._ended and self._ended[0][1].has_passed():
            step, _ = self._ended.popleft()
            reporter = self._open()
            if not self._bits:
                reporter.begin_step(step.endpoint, step.key, step.chunks)
            reporter.end_step()

    def close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None

    def _open(self) -> ProgressReporter:
        if self._reporter is None:
            self._reporter = ProgressReporter(PROTOCOL_VERSION, *self._rank, self._trust.auth, self._trust.insecure)
        return self._reporter
