"""One worker rank as the connector's hooks see it. Nothing here blocks but start-up and shutdown."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.metadata import StepMetadata
from vllm_datadist_connector.metrics import WorkerMeter
from vllm_datadist_connector.protocol.handshake import CacheLayout, LayoutContract, RankGeometry
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.driver import PullDriver
from vllm_datadist_connector.worker.kv_layout import CacheSpec, describe_caches
from vllm_datadist_connector.worker.transfers import FinishedPulls

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_ROLE_PROMPT, _ROLE_DECODER, _ROLE_MIX = 1, 2, 3
_DT_UINT8 = 4
_DEFAULT_DEVICE_BYTES = 50 << 30


class EngineError(RuntimeError):
    """The engine refused at start-up; carries its code's name and reason."""


class ConnectorWorker:
    """Owns the engine endpoint of one rank; the pull driver exists on consumers once KV caches are registered."""

    def __init__(
        self,
        config: ConnectorConfig,
        contract: LayoutContract,
        tp_rank: int,
        pp_rank: int,
        rank_index: int,
        is_producer: bool,
        is_consumer: bool,
    ) -> None:
        self._config = config
        self._contract = contract
        self._tp_rank = tp_rank
        self._pp_rank = pp_rank
        self._rank_index = rank_index
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._cluster_id = secrets.randbits(62) + 1
        role = _ROLE_MIX if is_producer and is_consumer else _ROLE_PROMPT if is_producer else _ROLE_DECODER
        self._datadist = _native.LlmDataDist(self._cluster_id, role, config.provider)
        self._meter = WorkerMeter(source=f"pp{pp_rank}tp{tp_rank}")
        self._driver: PullDriver | None = None
        self._geometry: RankGeometry | None = None
        self._sent: set[str] = set()

    def register_kv_caches(
        self, kv_caches: Mapping[str, torch.Tensor], group_of_layer: Mapping[str, int], num_blocks: int
    ) -> None:
        """Starts the engine and makes the KV cache transferable.

        Raises:
            LayoutError: a tensor cannot be moved block by block.
            EngineError: the engine refused.
        """
        specs = describe_caches(kv_caches, group_of_layer, num_blocks)
        total = sum(len(spec.addrs) * spec.num_blocks * spec.block_bytes for spec in specs)
        self._check(self._datadist.initialize(self._options(total)), "Initialize")
        layouts = tuple(self._register(spec) for spec in specs)
        port = 0
        if self._is_producer:
            status, port = self._datadist.listen_port()
            self._check(status, "listening")
        self._geometry = RankGeometry(
            tp_rank=self._tp_rank,
            pp_rank=self._pp_rank,
            cluster_id=self._cluster_id,
            host=self._config.host,
            port=port,
            contract=self._contract,
            caches=layouts,
        )
        if self._is_consumer:
            self._driver = PullDriver(self._datadist, self._geometry, self._config, self._meter)
        logger.info(
            "registered %d KV caches of %d blocks, %.1f MiB, cluster %d%s",
            len(layouts),
            num_blocks,
            total / 2**20,
            self._cluster_id,
            f", listening on {Endpoint(self._config.host, port)}" if port else "",
        )

    def handshake(self) -> bytes | None:
        """This rank's RankGeometry in msgpack, for the side channel of its scheduler; None before registration."""
        return msgspec.msgpack.encode(self._geometry) if self._geometry is not None else None

    def start_step(self, step: StepMetadata) -> None:
        self._sent.update(step.ended_leases)
        if self._driver is None:
            return
        for job in step.pulls:
            self._driver.submit(job)
        for request_id in step.cancels:
            self._driver.cancel(request_id)

    def take_sent(self) -> set[str]:
        """P's requests whose blocks go back to vLLM; each once per rank."""
        sent, self._sent = self._sent, set()
        return sent

    def take_received(self) -> FinishedPulls:
        if self._driver is None:
            return FinishedPulls(set(), set(), set())
        self._meter.linked_peers(self._driver.linked_peers())
        return self._driver.take_finished()

    @property
    def meter(self) -> WorkerMeter:
        return self._meter

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver = None
        self._datadist.finalize()

    def _options(self, total_bytes: int) -> dict[str, str]:
        config = self._config
        options = {
            "llm.DeviceId": "0",
            "llm.SyncKvCacheWaitTime": str(int(config.pull_timeout_s * 1000)),
            "datadist.Transport": config.transport,
            "datadist.TransferThreads": str(config.transfer_threads),
            "datadist.TcpStreams": str(config.tcp_streams),
            "datadist.HugePages": str(int(config.huge_pages)),
            # vLLM sized its KV cache already; the documented default limit would only refuse large hosts.
            "datadist.MaxDeviceBytes": str(max(_DEFAULT_DEVICE_BYTES, total_bytes)),
        }
        if self._is_producer:
            port = config.engine_port + self._rank_index if config.engine_port else 0
            options["llm.ListenIpInfo"] = str(Endpoint(config.host, port))
        return options

    def _register(self, spec: CacheSpec) -> CacheLayout:
        status, cache_id = self._datadist.register_kv_cache(
            [spec.num_blocks, spec.block_bytes], _DT_UINT8, list(spec.addrs)
        )
        self._check(status, f"RegisterKvCache of {len(spec.addrs)} tensors")
        return CacheLayout(
            cache_id=cache_id,
            group=spec.group,
            num_blocks=spec.num_blocks,
            block_bytes=spec.block_bytes,
            layers=spec.layers,
        )

    def _check(self, status: int, what: str) -> None:
        if status != _native.LLM_SUCCESS:
            raise EngineError(f"{what}: {_native.status_name(status)} (0x{status:08X}): {_native.last_error()}")
