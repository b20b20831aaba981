"""While an ACL graph is captured nothing is asked of CANN's library: a link that is made then would end the capture.

vllm-ascend captures once, when its workers have their KV cache and before the scheduler is there; a graph is captured
between torch.npu.graph's begin and end, and what of ours runs then is what the attention layers call. The calls that
reach the library are told by the one that stands in for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.v1.worker.gpu_model_runner as gpu_model_runner
from instance import Instance
from steps import prefill_all, prompt, run
from support.pd import LOOPBACK, TO_P
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm_ascend.attention.utils import (
    maybe_save_kv_layer_to_connector,
    notify_kv_cache_written,
    wait_for_kv_layer_from_connector,
)
from vllm_ascend.compilation.acl_graph import ACLGraphWrapper
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

MakeInstance = Callable[..., Instance]
BEGINS, ENDS = "capture begins", "capture ends"
MODE = CUDAGraphMode.FULL


class Trace:
    """What the library is asked, one line each, and when a graph's capture begins and ends."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, what: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{what}\n")

    def parts(self) -> tuple[list[str], list[str], list[str]]:
        """(before the capture, during, after)."""
        lines = self._file.read_text().splitlines()
        begin, end = lines.index(BEGINS), lines.index(ENDS)
        return lines[:begin], lines[begin + 1 : end], lines[end + 1 :]

    @contextmanager
    def capture(self, graph: Any, **options: Any) -> Iterator[None]:
        """As torch.npu.graph."""
        del graph, options
        self.note(BEGINS)
        yield
        self.note(ENDS)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_instance: MakeInstance) -> Trace:
    del make_instance  # sets the other variables
    file = tmp_path / "calls"
    monkeypatch.setenv("CANN_STANDIN_TRACE", str(file))
    trace = Trace(file)
    monkeypatch.setattr(torch.npu, "graph", trace.capture)
    return trace


def capture_model(instance: Instance, meanwhile: Callable[[], object]) -> None:
    """vllm-ascend's own, of a model that consists of what its attention layers call."""

    def forward() -> list[torch.Tensor]:
        for layer, parts in instance.tensors.items():
            wait_for_kv_layer_from_connector(layer)
            notify_kv_cache_written(layer)
            maybe_save_kv_layer_to_connector(layer, list(parts))
        meanwhile()
        return []

    wrapper = ACLGraphWrapper(forward, instance.config, MODE)
    descriptor = BatchDescriptor(num_tokens=1)

    def capture(**_: Any) -> None:
        metadata: Any = {layer: object() for layer in instance.tensors}
        with set_forward_context(metadata, instance.config, cudagraph_runtime_mode=MODE, batch_descriptor=descriptor):
            wrapper()

    runner = NPUModelRunner.__new__(NPUModelRunner)
    runner.__dict__.update(
        compilation_config=SimpleNamespace(cudagraph_mode=MODE),
        cudagraph_dispatcher=SimpleNamespace(get_capture_descs=lambda: [(MODE, [descriptor])]),
        encoder_cudagraph_manager=None,
        device=torch.device("cpu"),
        _maybe_init_encoder_cudagraph_manager=lambda: None,
        _capture_cudagraphs=capture,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_model_runner, "graph_capture", lambda **_: nullcontext())
        patch.setattr(gpu_model_runner, "lock_workspace", lambda: None)
        patch.setattr(torch.npu, "mem_get_info", lambda: (0, 0))
        for name in ("synchronize", "empty_cache"):
            patch.setattr(torch.accelerator, name, lambda: None)
        runner.capture_model()


def test_a_d_links_when_it_has_captured(make_instance: MakeInstance, trace: Trace) -> None:
    p = make_instance("kv_producer")
    (params,) = prefill_all(p, {"r": prompt(0)}).values()
    d = make_instance("kv_consumer", warm_up=lambda d: capture_model(d, p.step))
    d.add("r", prompt(0), params, max_tokens=2)
    run(d)
    before, during, after = trace.parts()
    assert any("Register" in call for call in before)
    assert during == []
    assert any("Link" in call for call in after)
    assert not any("Register" in call for call in after)


def test_a_p_is_not_known_before_it_has_captured(make_instance: MakeInstance, trace: Trace) -> None:
    """A D that knows the P that was here before asks and asks, and gets no answer yet."""
    with socket.create_server((LOOPBACK, 0)) as unused:
        where = {"side_channel_port": unused.getsockname()[1]}
    before = make_instance("kv_producer", extra=where)
    params = prefill_all(before, {"old": prompt(0)})["old"]
    d = make_instance("kv_consumer", extra={"handshake_timeout_s": 0.5})
    before.close()
    asked: list[Any] = []

    def ask() -> None:
        d.add("old", prompt(0), params, max_tokens=2)
        asked.append(run(d)["old"])

    p = make_instance("kv_producer", extra=where, warm_up=lambda p: capture_model(p, ask))
    (outputs,) = asked
    assert outputs[0].prefill_stats.num_cached_tokens == 0
    assert trace.parts()[1] == []
    p.add("new", prompt(1), dict(TO_P))
    d.add("new", prompt(1), p.step()["new"].kv_transfer_params, max_tokens=2)
    assert run(d)["new"][0].prefill_stats.num_computed_tokens == 1
    assert any("Link" in call for call in trace.parts()[2])
