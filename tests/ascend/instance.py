"""An instance of vLLM on vllm-ascend's platform, less its model: scheduler, KV cache, connector and steps are real.

What the model would do is to write the KV of each token that is scheduled, and to read that of all before it. Both are
done here: what is written tells the token and its position, and whoever reads something else fails the test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocation import Model, allocate
from support.pd import LOOPBACK
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from vllm_datadist_connector.worker import build

BLOCK_SIZE = 128
SAMPLED = 7
"""What the model says, always: a step may run before the one before it has told what it sampled."""
MODULUS = 251  # of what bfloat16 holds exactly
init_none_hash(hash)  # once: what it draws at random begins the hash of every prompt


class Instance:
    def __init__(
        self,
        directory: Path,
        layout: Model,
        role: str,
        warm_up: Callable[[Instance], None] = lambda _: None,
        **settings: Any,
    ) -> None:
        """
        Args:
            directory: of the model's configuration.
            warm_up: what the worker does once it has its KV cache. vLLM's scheduler, and who is to know of the worker,
                come later.
            settings: see make_config().
        """
        self.config = make_config(directory, role, **settings)
        self.config.cache_config.num_gpu_blocks = layout.num_blocks
        self._layout = layout
        cache = layout.config()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("get_tp_group", "get_pp_group"):
                patch.setattr(build, name, lambda: SimpleNamespace(rank_in_group=0))
            self.worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, cache)
        self.tensors = allocate(layout)
        with self.as_worker():
            self.worker.register_kv_caches(self.tensors)
            warm_up(self)
        try:
            self.scheduler = scheduler_class_of(self.config)(
                vllm_config=self.config,
                kv_cache_config=cache,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK_SIZE,
                log_stats=True,
            )
        except Exception:
            self.worker.shutdown()
            raise
        self._runs_ahead = self.config.scheduler_config.async_scheduling
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.connector.set_xfer_handshake_metadata({0: self.worker.get_handshake_metadata()})

    @property
    def connector(self) -> Any:
        return self.scheduler.connector

    @contextmanager
    def as_worker(self) -> Iterator[None]:
        """vLLM has one worker connector for each process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", self.worker)
            yield

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()

    # ---- requests ----

    def add(self, request_id: str, prompt: list[int], params: Any = None, max_tokens: int = 1) -> Request:
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args={"kv_transfer_params": params} if params is not None else None,
            ),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, lambda value: repr(value).encode()),
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> dict[str, Any]:
        """The outputs by request. With asynchronous scheduling those of the step before the one that starts now."""
        scheduled = self.scheduler.schedule()
        self._in_flight.append((scheduled, self._run(scheduled)))
        if self._runs_ahead and len(self._in_flight) == 1 and scheduled.total_num_scheduled_tokens:
            return {}
        outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
        return {each.request_id: each for core in outputs.values() for each in core.outputs}

    def tables(self, request_id: str) -> tuple[list[int], ...]:
        tables: tuple[list[int], ...] = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return tables

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    # ---- the worker ----

    def _run(self, scheduled: Any) -> ModelRunnerOutput:
        ids = list(scheduled.num_scheduled_tokens)
        with self.as_worker(), set_forward_context(None, self.config):
            self.worker.handle_preemptions(scheduled.kv_connector_metadata)
            with KVConnectorModelRunnerMixin._get_kv_connector_output(scheduled) as report:
                sampled = [self._forward(name, count) for name, count in scheduled.num_scheduled_tokens.items()]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=report,
        )

    def _forward(self, request_id: str, count: int) -> list[int]:
        request = self.scheduler.requests[request_id]
        end = request.num_computed_tokens
        known = list(request.all_token_ids)
        tokens = (known + [SAMPLED] * (end - len(known)))[:end]
        for layers, table in zip(self._layout.groups, self.tables(request_id), strict=True):
            for layer in layers:
                access = self._state if isinstance(self._layout.specs[layer], MambaSpec) else self._tokens
                access(layer, table, tokens, end - count)
        return [SAMPLED] if end >= request.num_prompt_tokens and end >= len(known) else []

    def _tokens(self, layer: str, table: list[int], tokens: list[int], start: int) -> None:
        """Reads what was computed before `start`, and is looked back on; writes the rest."""
        window = getattr(self._layout.specs[layer], "sliding_window", None)
        first = max(0, start - window + 1) if window else 0
        values = torch.tensor([(token + 3 * at) % MODULUS for at, token in enumerate(tokens)])
        at = torch.arange(len(tokens))
        for part, tensor in enumerate(self.tensors[layer]):
            per_block = tensor.shape[1]
            scale = BLOCK_SIZE // per_block
            blocks = torch.tensor(table)[at // BLOCK_SIZE] * scale + at % BLOCK_SIZE // per_block
            expected = (values + part).to(tensor.dtype)
            found = tensor[blocks[first:start], at[first:start] % per_block]
            wrong = (found != expected[first:start, None, None]).flatten(1).any(1)
            assert not wrong.any(), f"{layer}:{part}: KV of {int(wrong.sum())} of {start} tokens is not theirs"
            tensor[blocks[start:], at[start:] % per_block] = expected[start:, None, None].expand(-1, *tensor.shape[2:])

    def _state(self, layer: str, table: list[int], tokens: list[int], start: int) -> None:
        """From one block of tokens to the next a state moves on into a block of its own."""
        src, dst = (table[min(max(at - 1, 0) // BLOCK_SIZE, len(table) - 1)] for at in (start, len(tokens)))
        for part, tensor in enumerate(self.tensors[layer]):
            expected = (sum(tokens[:start]) + part) % MODULUS
            assert start == 0 or (tensor[src] == expected).all(), f"{layer}:{part}: not the state after {start} tokens"
            tensor[dst] = (sum(tokens) + part) % MODULUS


def make_config(
    directory: Path,
    role: str,
    is_async: bool = False,
    additional: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    policy: str = "recompute",
    max_tokens: int = 1024,
    caching: bool = True,
) -> VllmConfig:
    """As `vllm serve` has it once the platform has had its say.

    Args:
        additional: of --additional-config, which is how vllm-ascend is configured.
        extra: of kv_connector_extra_config.
        max_tokens: in a step.
    """
    return VllmConfig(
        model_config=ModelConfig(
            model=str(directory), skip_tokenizer_init=True, dtype="bfloat16", seed=0, enforce_eager=True
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=max_tokens,
            max_model_len=2048,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=is_async,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector="DataDistConnector",
            kv_role=role,
            engine_id=f"engine-{role}",
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"host": LOOPBACK, "insecure": True, "weights_id": "none", **(extra or {})},
        ),
        additional_config=additional or {},
    )


def scheduler_class_of(config: VllmConfig) -> type[Any]:
    chosen = config.scheduler_config.get_scheduler_cls()
    return resolve_obj_by_qualname(chosen) if isinstance(chosen, str) else chosen
