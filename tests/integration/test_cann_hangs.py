"""A call of the library's that never returns: nothing waits for it for ever, and nothing that it may write to is given
away."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import closing
from pathlib import Path

import pytest
from support import pd
from support.cann_ranks import TOKENS, Told, calls, model_of, run_in_process, start_rank
from support.producer_process import prefill, start_scheduler

from vllm_datadist_connector.metadata import PullJob, StepMetadata
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.worker import endings, quarantine


def d_gives_up(trace: Path) -> None:
    told = Told()
    with pytest.MonkeyPatch.context() as patch, closing(start_scheduler()) as scheduler:
        patch.setattr(endings, "GRACE_S", 0.3)
        patch.setattr(quarantine, "LONG_S", 0.1)
        d_memory = model_of(2, seed=2)
        p = start_rank(model_of(2, seed=1), is_producer=True)
        d = start_rank(d_memory, is_producer=False, pull_timeout_s=0.2, link_timeout_s=2.0)
        encoded = p.handshake()
        assert encoded is not None
        scheduler.set_geometries({(0, 0): encoded})
        remote = parse_remote_prefill(prefill(scheduler, "r", [1]))
        d.start_step(StepMetadata(pulls=(PullJob("r", remote, ((2,),), 0, TOKENS, "", False, 0.3),)))
        pd.wait_until(lambda: any("1 blocks are kept back" in line for line in told.lines), "word of its blocks")
        assert len(calls(trace, "PullKvBlocks hangs")) == 1
        assert d.take_received().received == set()

        tensors = [weakref.ref(tensor) for layer in d_memory.values() for tensor in layer]
        began = time.monotonic()
        d.close()
        assert time.monotonic() - began < 10
        assert told.critical("may be written to, until this process has ended") == 1
        del d, d_memory
        gc.collect()
        assert None not in [tensor() for tensor in tensors]
        p.close()
    assert len(calls(trace, "Finalize")) == 1, "P's, which has nothing that hangs"


def test_a_d_gives_up_and_keeps_what_may_be_written(tmp_path: Path) -> None:
    run_in_process(d_gives_up, tmp_path, hang=1)
