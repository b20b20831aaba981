"""One worker rank as the connector's hooks see it. Only start-up and shutdown block, and for a moment empty steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.metadata import Home, StepMetadata
from vllm_datadist_connector.metrics import DataDistStats, WorkerMeter
from vllm_datadist_connector.protocol.contract import LayoutContract
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.worker import endings
from vllm_datadist_connector.worker.caches import DEVICE, HOST, RegisteredCaches, check
from vllm_datadist_connector.worker.device import Device, HostDevice, device_of, wait_for
from vllm_datadist_connector.worker.driver import RankDriver
from vllm_datadist_connector.worker.giving import Giving
from vllm_datadist_connector.worker.huge_pages import log_when_done
from vllm_datadist_connector.worker.janitor import Janitor
from vllm_datadist_connector.worker.kv_layout import MAX_TENSORS_PER_CACHE, KVCaches, describe_caches, find_memory
from vllm_datadist_connector.worker.kv_spec import LayerKV
from vllm_datadist_connector.worker.options import LISTEN, make_options
from vllm_datadist_connector.worker.registrations import plan_registrations
from vllm_datadist_connector.worker.transfers import FinishedPulls

logger = logging.getLogger(__name__)

_PAUSE_S = 0.001
"""As long as vLLM pauses after a step that has computed nothing. A pull that ends in such a pause is heard of after it,
and its request scheduled after one more."""

_DRAFTS_S = 10.0
"""A device that has not done its work by then hangs."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a worker rank stands in its instance."""

    tp_rank: int
    pp_rank: int
    tp_size: int
    pp_size: int
    index: int
    """Of the rank among all of the instance's, over data, pipeline and tensor parallelism: offset of its ports."""


class ConnectorWorker:
    """Owns the engine endpoint of one rank; its driver exists once KV caches are registered, on Ps if they push."""

    def __init__(
        self,
        config: ConnectorConfig,
        datadist: _native.LlmDataDist,
        contract: LayoutContract,
        place: RankPlace,
        layers: Mapping[str, LayerKV],
        block_sizes: tuple[int, ...],
        duties: Duties,
        announces_layers: bool = True,
        drafts_late: bool = False,
    ) -> None:
        """
        Args:
            datadist: made, not initialized.
            announces_layers: vLLM calls save_kv_layer() once in a step for each layer that has it called.
            layers: what each layer's KV cache holds.
            block_sizes: tokens per block of each KV cache group; 0 for a group of states.
            duties: those that the instance may have.
            drafts_late: a drafter writes KV after the step's tokens are known.
        """
        self._config = config
        self._contract = contract
        self._place = place
        self._layers = layers
        self._block_sizes = block_sizes
        self._duties = duties
        self._announces_layers = announces_layers
        self._waits_for_drafts = duties.gives and drafts_late
        self._datadist = datadist
        self._meter = WorkerMeter(f"pp{place.pp_rank}tp{place.tp_rank}")
        self._device: Device = HostDevice()
        self._driver: RankDriver | None = None
        self._janitor: Janitor | None = None
        self._giving: Giving | None = None
        self._geometry: RankGeometry | None = None
        self._sent: set[str] = set()
        self._step: StepMetadata | None = None
        self._is_watching = False
        self._scheduler_has_stats = False
        self._huge_pages: threading.Thread | None = None
        self._kv_caches: KVCaches = {}
        """Held as long as calls may write into them."""

    def register_kv_caches(self, kv_caches: KVCaches, num_blocks: int) -> None:
        """Starts the engine and makes the KV cache transferable.

        Raises:
            LayoutError: a tensor cannot be moved block by block.
            EngineError: the engine refused.
        """
        self._kv_caches = kv_caches
        can = self._datadist.capabilities
        max_tensors = min(can.max_addrs_per_cache or MAX_TENSORS_PER_CACHE, MAX_TENSORS_PER_CACHE)
        memory = find_memory(kv_caches, self._layers, can.host_memory, can.device_memory)
        specs = describe_caches(kv_caches, self._layers, num_blocks, max_tensors)
        plan = plan_registrations(specs, can.max_regions)
        options = make_options(self._config, can, self._duties, self._place.index, memory.device)
        check(self._datadist.initialize(options), "Initialize")
        check(self._datadist.enter_thread(), "entering vLLM's thread")
        placement = HOST if memory.is_host and can.device_memory else DEVICE
        caches = RegisteredCaches(self._datadist, specs, plan, placement, memory.is_host)
        self._device = device_of(memory.kind)
        layouts = caches.layouts()
        port = self._listen_port() if LISTEN in options else 0
        self._geometry = RankGeometry(
            tp_rank=self._place.tp_rank,
            pp_rank=self._place.pp_rank,
            tp_size=self._place.tp_size,
            pp_size=self._place.pp_size,
            cluster_id=self._datadist.cluster_id,
            host=self._config.host,
            port=port,
            contract=self._contract,
            block_sizes=self._block_sizes,
            caches=layouts,
            pushes=self._duties.gives and can.grants_writes,
        )
        if self._config.huge_pages and can.engine_options:
            self._huge_pages = log_when_done(self._datadist)
        if self._duties.takes or self._geometry.pushes:
            self._driver = RankDriver(self._datadist, self._geometry, caches, self._config, self._meter, can)
        if self._duties.gives:
            trust = Trust(self._config.auth, self._config.insecure)
            is_announced = self._announces_layers and memory.is_host
            self._giving = Giving(self._geometry, trust, self._device, is_announced)
        if self._duties.gives and not can.peer_drops_half:
            self._janitor = Janitor(self._datadist)
        logger.info(
            "registered %d tensors in %d KV caches of %d blocks, cluster %d%s",
            sum(len(layout.layers) for layout in layouts),
            len(layouts),
            num_blocks,
            self._datadist.cluster_id,
            f", listening on {Endpoint(self._config.host, port)}" if port else "",
        )

    def _listen_port(self) -> int:
        if not self._datadist.capabilities.reports_port:
            return self._config.engine_port + self._place.index
        status, port = self._datadist.listen_port()
        check(status, "listening")
        return port

    def handshake(self) -> bytes | None:
        """This rank's RankGeometry in msgpack, for the side channel of its scheduler; None before registration."""
        return msgspec.msgpack.encode(self._geometry) if self._geometry is not None else None

    def start_step(self, step: StepMetadata) -> None:
        """Once for each step, however many hooks bring it."""
        if step is self._step:
            return
        self._step = step
        self._sent.update(step.ended_leases)
        self._scheduler_has_stats = step.has_stats
        if step.left_clusters and self._janitor is not None:
            self._janitor.unlink(step.left_clusters)
        if step.home is not None:
            self._watch(step.home)
        if self._driver is None:
            return
        if step.pulls:
            fence = self._device.fence()
            for job in step.pulls:
                self._driver.submit(job, fence)
        for request_id in step.cancels:
            self._driver.cancel(request_id)

    def begin_forward(self, step: StepMetadata) -> None:
        """Before anything of the step is computed; again for the same step is nothing."""
        if self._giving is not None:
            self._giving.begin(step.giving)
        if step.giving is not None:
            self._watch(Home(Endpoint(*step.giving.endpoint), step.giving.key))

    def _watch(self, home: Home) -> None:
        if self._driver is not None and not self._is_watching:
            self._is_watching = True
            self._driver.watch(home)

    def layer_written(self, step: StepMetadata, layer_name: str) -> None:
        """In every layer of every step of the model."""
        if self._giving is not None and step.giving is not None:
            self._giving.begin(step.giving)
            self._giving.layer(layer_name)

    def end_forward(self, step: StepMetadata) -> None:
        """All that the step writes was given to the device."""
        if self._giving is not None:
            self._giving.begin(step.giving)
            self._giving.end()
        # vLLM hands over the step's tokens next, and with a request's first one its blocks to D: nothing may be written
        # there afterwards. It would wait for the drafts a moment later by itself.
        if self._waits_for_drafts and not wait_for(self._device.fence(), _DRAFTS_S):
            logger.error("the drafter's work has not ended within %g s: D may get KV of before it", _DRAFTS_S)

    def take_sent(self) -> set[str]:
        """P's requests whose blocks go back to vLLM; each once per rank."""
        if self._giving is not None:
            self._giving.poll()
        sent, self._sent = self._sent, set()
        return sent

    def take_received(self) -> FinishedPulls:
        if self._driver is None or not self._duties.takes:
            return FinishedPulls(set(), set(), set())
        self._meter.state(self._driver.linked_peers(), self._driver.quarantined_blocks())
        # With pipeline stages, a step may be empty because others are under way.
        waits = self._step is not None and self._step.only_pulls and self._place.pp_size == 1
        return self._driver.take_finished(_PAUSE_S if waits else 0.0)

    def take_stats(self) -> DataDistStats | None:
        """Empty ones if the scheduler has some: without any of ours vLLM 0.23 would not ask for its."""
        return self._meter.take() or (DataDistStats() if self._scheduler_has_stats else None)

    def close(self) -> None:
        ended = True
        if self._driver is not None:
            ended = self._driver.close()
            self._driver = None
        if self._janitor is not None:
            ended = self._janitor.close() and ended
            self._janitor = None
        if self._giving is not None:
            self._giving.close()
            self._giving = None
        if not ended:
            endings.keep(self._kv_caches)
            return
        self._kv_caches = {}
        self._datadist.finalize()
        if self._huge_pages is not None:
            self._huge_pages.join()
            self._huge_pages = None
