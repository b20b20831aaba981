"""Two ranks with the same recorded KV cache, registered as the connector does, and a pull from one to the other.

As a program (`python -m support.ascend_ends PROVIDER MODEL...`): a process of its own, for a provider whose library
stays loaded.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import parse_config
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.worker.caches import DEVICE, HOST, RegisteredCaches
from vllm_datadist_connector.worker.kv_layout import describe_caches
from vllm_datadist_connector.worker.options import adapt_config, make_options
from vllm_datadist_connector.worker.pairing import Terms, find_gaps, pair
from vllm_datadist_connector.worker.plan import TokenRange, plan_pull
from vllm_datadist_connector.worker.registrations import plan_registrations

from .ascend_layouts import NUM_BLOCKS, Memory
from .endpoints import LOOPBACK, MIX, check
from .pd import make_geometry

GIVES = Duties(gives=True, takes=False)
HARDWARE = Terms(own_views_only=True, min_run_bytes=4096)


class _Frozen:
    """An engine that takes no registration once somebody may have linked."""

    def __init__(self, datadist: _native.LlmDataDist) -> None:
        self._datadist = datadist
        self.capabilities = datadist.capabilities._replace(register_before_link=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datadist, name)


class Side:
    def __init__(self, model: str, cluster_id: int, max_regions: int = 0, provider: str = "engine") -> None:
        self.memory = Memory(model, seed=cluster_id)
        self.datadist = _native.LlmDataDist(cluster_id, MIX, provider)
        can = self.datadist.capabilities
        config = adapt_config(parse_config({}), (), can, {})
        check(self.datadist.initialize(make_options(config, can, GIVES, 0, 0, environ={})))
        check(self.datadist.enter_thread())
        specs = describe_caches(self.memory.tensors, self.memory.layers(), NUM_BLOCKS)
        frozen = cast("_native.LlmDataDist", _Frozen(self.datadist))
        plan = plan_registrations(specs, max_regions or can.max_regions)
        self.caches = RegisteredCaches(frozen, specs, plan, HOST if can.device_memory else DEVICE)
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


def check_transfer(p: Side, d: Side, model: str, terms: Terms) -> None:
    """One block of each group, byte by byte: D's whole memory, and so also that nothing else was written."""
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


def main(provider: str, *models: str) -> None:
    for index, model in enumerate(models):
        p, d = (Side(model, 2 * index + number, provider=provider) for number in (1, 2))
        check_transfer(p, d, model, HARDWARE)
        d.datadist.finalize()
        p.datadist.finalize()
        print(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
