"""Every KV cache that vllm-ascend allocates goes through our engine byte by byte, whatever views it hands over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ascend_ends import HARDWARE, Side, check_transfer
from support.ascend_layouts import RECORDED, Memory
from support.standin import standin_variables

from vllm_datadist_connector.worker.caches import EngineError
from vllm_datadist_connector.worker.pairing import ANY, Terms
from vllm_datadist_connector.worker.plan import TokenRange

MERGED = {"sparse C8 index": (12, 9), "sparse packed, C8 index": (9, 6)}
"""Regions of the caches by themselves, and with an index and its scales registered as one."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_side(stack: ExitStack) -> Any:
    def make(model: str, cluster_id: int, max_regions: int = 0) -> Side:
        side = Side(model, cluster_id, max_regions)
        stack.callback(side.datadist.finalize)
        return side

    return make


@pytest.mark.parametrize("terms", [ANY, HARDWARE], ids=["any", "hardware"])
@pytest.mark.parametrize("model", RECORDED)
def test_byte_by_byte(make_side: Any, model: str, terms: Terms) -> None:
    check_transfer(make_side(model, 1), make_side(model, 2), model, terms)


@pytest.mark.parametrize(("p_merges", "d_merges"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("model", MERGED)
def test_an_index_and_its_scales_registered_as_one(make_side: Any, model: str, p_merges: bool, d_merges: bool) -> None:
    """On either side: how many regions there are is a matter of how many layers a rank has."""
    separate, merged = MERGED[model]
    p, d = (make_side(model, i, merged if merges else separate) for i, merges in ((1, p_merges), (2, d_merges)))
    check_transfer(p, d, model, HARDWARE)


@pytest.mark.parametrize("model", RECORDED)
def test_nothing_is_registered_later(make_side: Any, model: str) -> None:
    side = make_side(model, 1)
    with pytest.raises(EngineError, match="was not registered in blocks of 7 bytes before the first link"):
        side.caches.view(0, 7)


def test_a_view_over_others_is_left_out(make_side: Any) -> None:
    """On A5 the index of DeepSeek V4 comes with its scales once more in one tensor: A3's peers do not have it."""
    a5, a3 = make_side("DeepSeek V4 on A5", 1), make_side("DeepSeek V4", 2)
    assert [each.segments for each in a5.geometry.caches] == [each.segments for each in a3.geometry.caches]
    d_expected = Memory("DeepSeek V4", seed=2)
    p_as_a3 = Memory("DeepSeek V4", seed=1)
    for group, (src, dst) in enumerate(((1, 3), (2, 1))):
        d_expected.copy_block(group, p_as_a3, src, dst)
    a3.link(a5)
    a3.pull(a5, TokenRange(0, 100, ((1,), (2,)), ((3,), (1,)), 100), HARDWARE)
    for ours, theirs in zip(a3.memory.storages, d_expected.storages, strict=True):
        assert torch.equal(ours, theirs)


def test_over_the_library_that_stands_in_for_canns() -> None:
    """It shows peers nothing that is registered after a link, and takes no option of our engine."""
    done = subprocess.run(
        [sys.executable, "-m", "support.ascend_ends", "cann", *RECORDED],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **standin_variables(strict=1)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.splitlines(), done.returncode) == ([*RECORDED], 0), done.stderr
