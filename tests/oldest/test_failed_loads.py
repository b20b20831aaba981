"""A load that fails in a model with several KV cache groups ends its own request only: vLLM's scheduler as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_datadist_connector import compat
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.metadata import StepMetadata

BLOCK_SIZE = 16
PROMPT_TOKENS = 7 * BLOCK_SIZE
WINDOW = 2 * BLOCK_SIZE
UNGUARDED = Scheduler._handle_invalid_blocks
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


class LoadsOnce(DataDistConnector, SupportsHMA):
    """Offers each prompt for loading once, as D's side does. What a worker would report is up to the test."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        self.loading: set[str] = set()
        self.finished: dict[str, RequestStatus] = {}

    def on_new_request(self, request: Request) -> None:
        return

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        count = 0 if request.request_id in self.loading else request.num_prompt_tokens - num_computed_tokens
        return count, count > 0

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self.loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        return

    def request_finished_all_groups(self, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        self.finished[request.request_id] = request.status
        return False, None

    def get_kv_connector_stats(self) -> None:
        return None


class SomebodyElses(KVConnectorBase_V1):
    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = None
    get_num_new_matched_tokens = LoadsOnce.get_num_new_matched_tokens
    update_state_after_alloc = LoadsOnce.update_state_after_alloc
    build_connector_meta = LoadsOnce.build_connector_meta
    request_finished = LoadsOnce.request_finished_all_groups
    loading = frozenset()


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """As the plugin leaves vLLM, for the time of a test."""
    compat.guard_failed_loads()
    yield
    Scheduler._handle_invalid_blocks = UNGUARDED


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


@pytest.fixture
def make_scheduler(model: Path) -> Callable[..., Scheduler]:
    def make(policy: str, num_groups: int = 2, connector: type[KVConnectorBase_V1] = LoadsOnce) -> Scheduler:
        config = VllmConfig(
            model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, dtype="float32", seed=0),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=1024,
                max_model_len=1024,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
            ),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(
                kv_connector=connector.__name__,
                kv_connector_module_path=__name__,
                kv_role="kv_both",
                kv_load_failure_policy=policy,
            ),
        )
        shape = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
        specs = [FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=WINDOW)][:num_groups]
        config.cache_config.num_gpu_blocks = 200
        groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
        return Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )

    return make


def add_request(scheduler: Scheduler, request_id: str, first_token: int) -> Request:
    init_none_hash(hash)
    request = Request(
        request_id=request_id,
        prompt_token_ids=list(range(first_token, first_token + PROMPT_TOKENS)),
        sampling_params=SamplingParams(max_tokens=4, ignore_eos=True),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, lambda value: repr(value).encode()),
    )
    scheduler.add_request(request)
    return request


def start_loads(scheduler: Scheduler, *names: str) -> list[Request]:
    requests = [add_request(scheduler, name, 1 + 200 * index) for index, name in enumerate(names)]
    step(scheduler)
    assert all(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS for request in requests)
    return requests


def step(scheduler: Scheduler, received: set[str] | None = None, invalid: set[int] | None = None) -> dict[str, Any]:
    """One engine step whose workers report this; returns the outputs by request, and `scheduled` tokens."""
    scheduled = scheduler.schedule()
    ids = list(scheduled.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={name: index for index, name in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
        kv_connector_output=KVConnectorOutput(finished_recving=received, invalid_block_ids=invalid or set()),
    )
    outputs = scheduler.update_from_output(scheduled, output)
    by_request = {each.request_id: each for core in outputs.values() for each in core.outputs}
    return {"scheduled": dict(scheduled.num_scheduled_tokens), **by_request}


def blocks_of(scheduler: Scheduler, request: Request, group: int) -> set[int]:
    null = scheduler.kv_cache_manager.block_pool.null_block.block_id
    return set(scheduler.kv_cache_manager.get_block_ids(request.request_id)[group]) - {null}


def free_blocks(scheduler: Scheduler) -> int:
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def test_without_the_guard_the_engine_core_dies(make_scheduler: Callable[..., Scheduler]) -> None:
    """The symptom: when this fails, the guard can go."""
    Scheduler._handle_invalid_blocks = UNGUARDED
    scheduler = make_scheduler("fail")
    (request,) = start_loads(scheduler, "one")
    with pytest.raises(ValueError, match="too many values to unpack"):
        step(scheduler, {"one"}, blocks_of(scheduler, request, 0))


@pytest.mark.parametrize("group", [0, 1], ids=["full", "sliding"])
def test_fail_ends_the_failed_request_alone(make_scheduler: Callable[..., Scheduler], group: int) -> None:
    scheduler = make_scheduler("fail")
    free = free_blocks(scheduler)
    bad, _, good = start_loads(scheduler, "bad", "waits", "good")
    outputs = step(scheduler, {"bad", "good"}, blocks_of(scheduler, bad, group))
    assert str(outputs["bad"].finish_reason) == "error"
    assert set(outputs) == {"scheduled", "bad"}
    assert scheduler.connector.finished == {"bad": RequestStatus.FINISHED_ERROR}
    assert set(scheduler.requests) == {"waits", "good"}

    outputs = step(scheduler)
    assert outputs["scheduled"] == {"good": 1}  # all but the last token came from outside
    assert good.num_output_tokens == 1
    step(scheduler, {"waits"})
    for _ in range(5):
        step(scheduler)
    assert not scheduler.requests
    assert free_blocks(scheduler) == free


@pytest.mark.parametrize("group", [0, 1], ids=["full", "sliding"])
def test_recompute_computes_the_failed_request_alone(make_scheduler: Callable[..., Scheduler], group: int) -> None:
    scheduler = make_scheduler("recompute")
    free = free_blocks(scheduler)
    bad, good = start_loads(scheduler, "bad", "good")
    outputs = step(scheduler, {"bad", "good"}, blocks_of(scheduler, bad, group))
    assert outputs == {"scheduled": {}}

    outputs = step(scheduler)
    assert outputs["scheduled"] == {"bad": PROMPT_TOKENS, "good": 1}
    for _ in range(5):
        step(scheduler)
    assert (bad.num_output_tokens, good.num_output_tokens) == (4, 4)
    assert set(scheduler.connector.finished.values()) == {RequestStatus.FINISHED_LENGTH_CAPPED}
    assert free_blocks(scheduler) == free


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_ranks_that_fail_one_after_the_other(make_scheduler: Callable[..., Scheduler], policy: str) -> None:
    """The blocks stay with the request until every rank has reported: until then one may still write into them."""
    scheduler = make_scheduler(policy)
    free = free_blocks(scheduler)
    (request,) = start_loads(scheduler, "one")
    used = free - free_blocks(scheduler)
    invalid = blocks_of(scheduler, request, 0)
    first = step(scheduler, None, invalid)
    assert ("one" in first) == (policy == "fail")
    assert free - free_blocks(scheduler) == used
    assert step(scheduler, {"one"}, invalid) == {"scheduled": {}}
    outputs = step(scheduler)
    assert outputs["scheduled"] == ({} if policy == "fail" else {"one": PROMPT_TOKENS})
    for _ in range(5):
        step(scheduler)
    assert not scheduler.requests
    assert free_blocks(scheduler) == free


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_an_aborted_load_may_fail(make_scheduler: Callable[..., Scheduler], policy: str) -> None:
    scheduler = make_scheduler(policy)
    free = free_blocks(scheduler)
    gone, _ = start_loads(scheduler, "gone", "stays")
    invalid = blocks_of(scheduler, gone, 0)
    scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    assert step(scheduler, {"gone"}, invalid) == {"scheduled": {}}
    step(scheduler, {"stays"})
    for _ in range(5):
        step(scheduler)
    assert scheduler.connector.finished["stays"] == RequestStatus.FINISHED_LENGTH_CAPPED
    assert free_blocks(scheduler) == free


def test_the_null_block_is_nobodys(make_scheduler: Callable[..., Scheduler]) -> None:
    scheduler = make_scheduler("fail")
    (request,) = start_loads(scheduler, "one")
    null = scheduler.kv_cache_manager.block_pool.null_block.block_id
    assert null in scheduler.kv_cache_manager.get_block_ids(request.request_id)[1]
    assert step(scheduler, None, {null}) == {"scheduled": {}}


def test_one_group_is_left_to_vllm(make_scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_end_failed_loads", None)
    scheduler = make_scheduler("fail", num_groups=1)
    (request,) = start_loads(scheduler, "one")
    assert str(step(scheduler, {"one"}, blocks_of(scheduler, request, 0))["one"].finish_reason) == "error"


def test_other_connectors_are_left_to_vllm(make_scheduler: Callable[..., Scheduler]) -> None:
    scheduler = make_scheduler("fail")
    (request,) = start_loads(scheduler, "one")
    scheduler.connector = SomebodyElses.__new__(SomebodyElses)
    with pytest.raises(ValueError, match="too many values to unpack"):
        step(scheduler, {"one"}, blocks_of(scheduler, request, 0))


def test_guarding_twice_guards_once() -> None:
    guarded = Scheduler._handle_invalid_blocks
    assert guarded is not UNGUARDED
    compat.guard_failed_loads()
    assert Scheduler._handle_invalid_blocks is guarded
