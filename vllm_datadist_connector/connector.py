"""DataDistConnector: vLLM's KV connector interface, routed to the scheduler or the worker side. No logic of its own.

Importable without the native library and without a device: vLLM imports it in its API server, too. Either side needs
the library, and is imported when it is made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConfigError, check_before_start, parse_config
from vllm_datadist_connector.metadata import RankHandshake, StepMetadata
from vllm_datadist_connector.metrics import DataDistPromMetrics, DataDistStats

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler
    from vllm_datadist_connector.worker.transfers import FinishedPulls
    from vllm_datadist_connector.worker.worker import ConnectorWorker

logger = logging.getLogger(__name__)
compat.share_logging()


class DataDistConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves KV caches between prefill and decode instances by LLM-DataDist's PullKvBlocks."""

    _cache_hit_source = compat.cache_hit_source()

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """
        Raises:
            ConfigError: a key of kv_connector_extra_config, an option of vLLM or the model's KV cache is not supported.
            OSError: the side channel's address cannot be bound.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        config = parse_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if compat.returns_routed_experts(vllm_config):
            raise ConfigError(
                "--enable-return-routed-experts is not supported with DataDistConnector: the experts that a prompt was"
                " routed to do not come with its KV cache, and vLLM would compute every prompt again; leave it out"
            )
        groups = compat.transfer_groups(kv_cache_config)
        self._group_ids = compat.transfer_group_ids(kv_cache_config)
        self._scheduler: ConnectorScheduler | None = None
        self._worker: ConnectorWorker | None = None
        self._load_errors: set[int] = set()
        self._huge_pages = config.huge_pages
        if role == KVConnectorRole.SCHEDULER:
            compat.guard_failed_loads()
            compat.watch_pauses()
            from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler

            self._scheduler = ConnectorScheduler(config, vllm_config, groups, self._group_ids)
        else:
            from vllm_datadist_connector.worker.build import build_worker

            self._worker = build_worker(config, vllm_config, groups)

    # ---- class-level questions ----

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        # Such blocks are cut between heads for other numbers of ranks; MLA has no heads to order.
        return None if vllm_config.model_config.use_mla else compat.heads_first_layout()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # The one question that vLLM may ask before it starts its processes and loads a model.
        check_before_start(extra_config)
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        # A sleeping vLLM unmaps the KV cache, which is registered: peers would read what is no longer there.
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DataDistStats:
        # A copy: vLLM aggregates into what it gets, and hands the same dict to each of its loggers.
        return DataDistStats().aggregate(DataDistStats(data=data)) if data else DataDistStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> DataDistPromMetrics:
        return DataDistPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler side ----

    def _set_paused(self, paused: bool) -> None:
        """No hook of vLLM's: compat.watch_pauses() calls it."""
        self._scheduling.set_paused(paused)

    def on_new_request(self, request: Request) -> None:
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        count = self._scheduling.matched_tokens(request, num_computed_tokens)
        return count, bool(count)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        # Only of what is loaded: vLLM makes the lists by a loop over all blocks of the request.
        tables = self._transferred(blocks.get_block_ids()) if num_external_tokens > 0 else ()
        self._scheduling.after_alloc(request, tables, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return self._scheduling.build_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduling.finished(connector_output.finished_recving or (), connector_output.finished_sending or ())
        if connector_output.kv_connector_stats is not None:
            self._scheduling.absorb_stats(connector_output.kv_connector_stats)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling.request_finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling.request_finished(request, self._transferred(block_ids))

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        # All that we write into: vLLM would zero the others' blocks while the pull fills them.
        return self._group_ids

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, tp_rank): value for tp_rank, value in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduling.set_geometries(
            {rank: value.geometry for rank, value in metadata.items() if isinstance(value, RankHandshake)}
        )

    def reset_cache(self) -> bool | None:
        # Nothing is cached here: what D pulled is in vLLM's own prefix cache.
        return True

    # ---- worker side ----

    def get_mem_pool_context(self) -> AbstractContextManager[object] | None:
        """Asked for since vLLM 0.31; before, a KV cache is touched when we see it first."""
        if not self._huge_pages:
            return None
        from vllm_datadist_connector.first_touch import FirstTouch

        return FirstTouch()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._working.register_kv_caches(kv_caches, self._kv_cache_config.num_blocks)

    def get_handshake_metadata(self) -> RankHandshake | None:
        geometry = self._working.handshake()
        return RankHandshake(geometry) if geometry is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # Nothing is to be saved: a request that waits for its pull cannot be preempted, and one whose pull is done
        # prefills again. But of all hooks with the step's metadata it is the first; vLLM 0.32 calls start_load_kv only
        # after the forward pass, which on the CPU has ended by then.
        if isinstance(kv_connector_metadata, StepMetadata):
            self._working.begin_forward(kv_connector_metadata)
            if compat.LOADS_MAY_PRECEDE_ZEROING:
                self._working.start_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        if isinstance(step, StepMetadata):
            self._working.start_step(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        step = self._connector_metadata
        if isinstance(step, StepMetadata):
            self._working.layer_written(step, layer_name)

    def wait_for_save(self) -> None:
        # The end of the step, on which D does not wait: it pulls what is final whenever it likes.
        step = self._connector_metadata
        if isinstance(step, StepMetadata):
            self._working.end_forward(step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, pulls = self._poll()
        self._load_errors |= pulls.invalid_blocks
        return sent or None, pulls.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        sent, pulls = self._poll()
        return compat.TransferResults(
            finished_sending=sent, finished_recving=pulls.received, failed_recving=pulls.failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        errors, self._load_errors = self._load_errors, set()
        return errors

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    # ---- both ----

    def get_kv_connector_stats(self) -> DataDistStats | None:
        return self._scheduler.take_stats() if self._scheduler is not None else self._working.take_stats()

    def _transferred(self, tables: Sequence[list[int]]) -> list[list[int]]:
        """The block tables of the KV cache groups that cross instances."""
        return [tables[group] for group in self._group_ids]

    def _poll(self) -> tuple[set[str], FinishedPulls]:
        return self._working.take_sent(), self._working.take_received()

    @property
    def _scheduling(self) -> ConnectorScheduler:
        if self._scheduler is None:
            raise RuntimeError("a scheduler hook was called on a worker's connector")
        return self._scheduler

    @property
    def _working(self) -> ConnectorWorker:
        if self._worker is None:
            raise RuntimeError("a worker hook was called on the scheduler's connector")
        return self._worker
