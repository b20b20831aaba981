"""Scenarios over the provider `cann`, each in a process of its own with all of its endpoints: a library that is loaded
stays loaded."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import parse_config
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.metadata import PullJob, StepMetadata
from vllm_datadist_connector.protocol.handshake import decode_geometry
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.worker.kv_layout import KVCaches
from vllm_datadist_connector.worker.kv_spec import Shards, TokenKV
from vllm_datadist_connector.worker.options import adapt_config
from vllm_datadist_connector.worker.transfers import FinishedPulls
from vllm_datadist_connector.worker.worker import ConnectorWorker, RankPlace

from . import pd
from .kv_ranks import DECODER_ROLE, PROMPT_ROLE
from .producer_process import prefill, start_scheduler
from .standin import standin_variables

P_CLUSTER = 10_000
PATIENCE_S = 60.0
NUM_BLOCKS, TOKENS, TOKEN_BYTES = 4, 16, 256

Scenario = Callable[[Path], None]
"""Takes the file with the calls of the library; see calls()."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["vllm.sampling_params", "vllm.v1.request"])


def run_in_process(scenario: Scenario, folder: Path, **rules: int) -> None:
    """
    Args:
        rules: of what stands in for CANN's library.
    """
    process = _processes.Process(target=_run, args=(scenario, folder / "calls", rules))
    process.start()
    process.join()
    assert process.exitcode == 0


def _run(scenario: Scenario, trace: Path, rules: dict[str, int]) -> None:
    pd.WAIT_S = PATIENCE_S
    os.environ.update(standin_variables(strict=1, trace=str(trace), **rules))
    scenario(trace)
    # Each of the endpoints would wait for its own threads, and some of those for ever.
    os._exit(0)


def calls(trace: Path, name: str) -> list[str]:
    return [line for line in trace.read_text().splitlines() if f" {name}" in line]


class Told(logging.Handler):
    """What the log says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._levels: list[str] = []
        logger = logging.getLogger("vllm_datadist_connector.worker")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._levels.append(record.levelname)

    def critical(self, text: str) -> int:
        """How many critical lines have it."""
        both = zip(self.lines, self._levels, strict=True)
        return sum(text in line and level == "CRITICAL" for line, level in both)


def model_of(layers: int, seed: int, sparse: bool = False) -> KVCaches:
    """K and V of each layer; of a sparse one an index and its scales, too, which lie in one storage."""
    random = torch.Generator().manual_seed(seed)

    def tensors(*widths: int) -> list[torch.Tensor]:
        """Behind one another."""
        sizes = [NUM_BLOCKS * TOKENS * width for width in widths]
        storage = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=random)
        return [
            part.view(NUM_BLOCKS, TOKENS, 1, width) for part, width in zip(storage.split(sizes), widths, strict=True)
        ]

    def layer() -> tuple[torch.Tensor, ...]:
        return (*tensors(TOKEN_BYTES), *tensors(TOKEN_BYTES), *(tensors(2 * TOKEN_BYTES, 2) if sparse else ()))

    return {f"layers.{index}": layer() for index in range(layers)}


def start_rank(caches: KVCaches, is_producer: bool, **extra: Any) -> ConnectorWorker:
    datadist = _native.LlmDataDist(P_CLUSTER + is_producer, PROMPT_ROLE if is_producer else DECODER_ROLE, "cann")
    one = Shards(1, 0, 1)
    worker = ConnectorWorker(
        adapt_config(parse_config({"huge_pages": False} | extra), tuple(extra), datadist.capabilities, {}),
        datadist,
        pd.make_contract(),
        RankPlace(0, 0, 1, 1, 0),
        dict.fromkeys(caches, TokenKV(0, TOKENS, one, one)),
        (TOKENS,),
        duties=Duties(gives=is_producer, takes=not is_producer),
    )
    worker.register_kv_caches(caches, NUM_BLOCKS)
    return worker


def check_pull(p_memory: KVCaches, d_memory: KVCaches, addresses: list[int], **extra: Any) -> None:
    """Block 1 of P into block 2 of D, of every layer.

    Args:
        addresses: of P's caches.
    """
    expected = {name: [tensor.clone() for tensor in tensors] for name, tensors in d_memory.items()}
    for name, tensors in expected.items():
        for ours, theirs in zip(tensors, p_memory[name], strict=True):
            ours[2] = theirs[1]
    with closing(start_scheduler()) as scheduler:
        p, d = start_rank(p_memory, is_producer=True, **extra), start_rank(d_memory, is_producer=False, **extra)
        encoded = p.handshake()
        assert encoded is not None
        assert [len(cache.layers) for cache in decode_geometry(encoded).caches] == addresses
        scheduler.set_geometries({(0, 0): encoded})
        remote = parse_remote_prefill(prefill(scheduler, "r", [1]))
        job = PullJob("r", remote, ((2,),), 0, TOKENS, remote.ticket.prompt_digest, False, PATIENCE_S)
        d.start_step(StepMetadata(pulls=(job,)))
        finished = FinishedPulls(set(), set(), set())

        def is_pulled() -> bool:
            nonlocal finished
            finished = d.take_received()
            return bool(finished.received)

        pd.wait_until(is_pulled, "the pull")
    assert finished.failed == set()
    for name, written in d_memory.items():
        assert all(map(torch.equal, written, expected[name])), name
