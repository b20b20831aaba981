"""Every KV cache that vllm-ascend allocates goes through our engine byte by byte, whatever views it hands over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from support.ascend_layouts import NUM_BLOCKS, RECORDED, Memory
from support.endpoints import LOOPBACK, MIX, check
from support.pd import make_geometry

from vllm_datadist_connector import _native
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.worker.caches import EngineError, RegisteredCaches
from vllm_datadist_connector.worker.kv_layout import describe_caches
from vllm_datadist_connector.worker.pairing import ANY, Terms, find_gaps, pair
from vllm_datadist_connector.worker.plan import TokenRange, plan_pull
from vllm_datadist_connector.worker.registrations import plan_registrations

HARDWARE = Terms(own_views_only=True, min_run_bytes=4096)
MERGED = {"sparse C8 index": (12, 9), "sparse packed, C8 index": (9, 6)}
"""Regions of the caches by themselves, and with an index and its scales registered as one."""


class _Frozen:
    """An engine that takes no registration once somebody may have linked."""

    def __init__(self, datadist: _native.LlmDataDist) -> None:
        self._datadist = datadist
        self.capabilities = datadist.capabilities._replace(register_before_link=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datadist, name)


class Side:
    def __init__(self, model: str, cluster_id: int, max_regions: int) -> None:
        self.memory = Memory(model, seed=cluster_id)
        self.datadist = _native.LlmDataDist(cluster_id, MIX)
        options = {"llm.DeviceId": "0", "llm.ListenIpInfo": f"{LOOPBACK}:0", "datadist.Transport": "local"}
        check(self.datadist.initialize(options))
        specs = describe_caches(self.memory.tensors, self.memory.layers(), NUM_BLOCKS)
        frozen = cast("_native.LlmDataDist", _Frozen(self.datadist))
        self.caches = RegisteredCaches(frozen, specs, plan_registrations(specs, max_regions))
        self._cluster_id = cluster_id
        self.geometry = self._geometry()

    def _geometry(self) -> RankGeometry:
        return make_geometry(
            cluster_id=self._cluster_id,
            port=self.datadist.listen_port()[1],
            block_sizes=self.memory.block_sizes,
            caches=self.caches.layouts(),
        )

    def link(self, other: Side) -> None:
        cluster = _native.ClusterInfo(
            other.geometry.cluster_id, [(LOOPBACK, other.geometry.port)], [(LOOPBACK, 0)], remote_role_type=MIX
        )
        check(self.datadist.link_clusters([cluster], 5000)[0])

    def pull(self, p: Side, tokens: TokenRange, terms: Terms) -> None:
        pairings = pair(self.geometry, p.geometry, terms)
        assert find_gaps(self.geometry, pairings) == []
        for pull in plan_pull(self.geometry, p.geometry, pairings, tokens):
            status = self.datadist.pull_kv_blocks(
                p.geometry.cluster_id,
                pull.src_cache_id,
                self.caches.view(pull.dst_index, pull.granule),
                pull.src_blocks,
                pull.dst_blocks,
                pull.src_layers,
                pull.dst_layers,
                1,
            )
            check(status)


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


def check_transfer(p: Side, d: Side, model: str, terms: Terms) -> None:
    groups = len(d.geometry.block_sizes)
    # Groups lie in the same memory: a block id is of one of them. Block 0 is nobody's.
    remote, local = ((1,), (2,))[:groups], ((3,), (1,))[:groups]
    expected = Memory(model, seed=d.geometry.cluster_id)
    for group in range(groups):
        expected.copy_block(group, p.memory, remote[group][0], local[group][0])
    d.link(p)
    d.pull(p, TokenRange(0, 100, remote, local, 100), terms)
    for ours, theirs in zip(d.memory.storages, expected.storages, strict=True):
        assert torch.equal(ours, theirs)


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
