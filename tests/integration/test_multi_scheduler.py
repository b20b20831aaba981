"""Ours and vLLM's OffloadingConnector in one MultiConnector: scheduler sides only, in vLLM's real scheduler.

One level below end to end: OffloadingConnector's worker refuses the CPU platform ("CPU Offloading is currently only
supported on CUDA-alike and XPU GPUs"), so no server can start with it here. Its scheduler side needs no device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.consumer import release
from support.pd import LOOPBACK, TO_P, wait_until
from support.vllm_versions import get_kv_cache_config_from_groups
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_datadist_connector import plugin
from vllm_datadist_connector.connector import DataDistConnector
from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.metadata import StepMetadata
from vllm_datadist_connector.metrics import WorkerMeter
from vllm_datadist_connector.protocol.params import parse_remote_prefill

BLOCK_SIZE, NUM_BLOCKS = 16, 200
WINDOW = 2 * BLOCK_SIZE
PROMPT = list(range(100, 100 + 7 * BLOCK_SIZE - 3))
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
OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 24}}
EXAMPLE = {"kv_connector": "ExampleConnector"}


class Instance:
    """A scheduler with its connectors, and the steps of an engine without a model."""

    def __init__(self, model: Path, role: str, others: list[dict[str, Any]], num_groups: int = 1) -> None:
        ours = {"kv_connector": "DataDistConnector", "kv_connector_extra_config": {"host": LOOPBACK}}
        children = [{**child, "kv_role": role} for child in (ours, *others)]
        transfer: dict[str, Any] = children[0]
        if others:
            transfer = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": children}}
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
            kv_transfer_config=KVTransferConfig(**{**transfer, "kv_role": role, "engine_id": f"engine-{role}"}),
        )
        self.config = config
        config.cache_config.num_gpu_blocks = config.cache_config.num_gpu_blocks_override = NUM_BLOCKS
        config.cache_config.kv_cache_layout = "LBHNC"
        shape = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
        specs = [FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=WINDOW)][:num_groups]
        groups = [KVCacheGroupSpec([f"layers.{index}"], spec) for index, spec in enumerate(specs)]
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=get_kv_cache_config_from_groups(config, groups, available_memory=1 << 40),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )

    @property
    def children(self) -> list[Any]:
        connector = self.scheduler.connector
        return connector._connectors if isinstance(connector, MultiConnector) else [connector]

    def add(self, request_id: str, prompt: list[int], params: Any = None, max_tokens: int = 1) -> Request:
        init_none_hash(hash)
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

    def step(self, **reported: Any) -> tuple[Any, dict[str, Any]]:
        """(what workers are told, outputs by request) of one step in which the workers report this."""
        scheduled = self.scheduler.schedule()
        ids = list(scheduled.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in ids]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[[7] if each.num_computed_tokens >= each.num_tokens else [] for each in requests],
            kv_connector_output=KVConnectorOutput(**reported),
        )
        outputs = self.scheduler.update_from_output(scheduled, output)
        self.stats = next((core.scheduler_stats for core in outputs.values() if core.scheduler_stats), None)
        return scheduled, {each.request_id: each for core in outputs.values() for each in core.outputs}

    def gauges(self) -> dict[str, int]:
        """What the last step's stats say of the state of ours that is not 0; empty if they say nothing of it."""
        stats = (self.stats.kv_connector_stats if self.stats is not None else None) or {}
        of_each = stats.get("DataDistConnector", stats).get("gauges", {})
        return {key: value for state in of_each.values() for key, value in state["values"].items() if value}

    def told(self, scheduled: Any) -> StepMetadata:
        """What our own worker side would get."""
        metadata = scheduled.kv_connector_metadata
        mine = getattr(metadata, "metadata", (metadata,))[0]
        assert isinstance(mine, StepMetadata)
        return mine

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def tables(self, request: Request) -> tuple[list[int], ...]:
        tables: tuple[list[int], ...] = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return tables


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plugin.register()
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


MakeInstance = Callable[..., Instance]


@pytest.fixture
def make_instance(model: Path) -> Iterator[MakeInstance]:
    made: list[Instance] = []

    def make(role: str, others: list[dict[str, Any]], num_groups: int = 1) -> Instance:
        made.append(Instance(model, role, others, num_groups))
        return made[-1]

    yield make
    for instance in made:
        instance.scheduler.shutdown()


def prefill(instance: Instance, prompt: list[int] = PROMPT) -> dict[str, Any]:
    """The params of a prompt that was prefilled for a D."""
    instance.add("at-p", prompt, dict(TO_P))
    _, outputs = instance.step()
    params = outputs["at-p"].kv_transfer_params
    assert isinstance(params, dict)
    return params


@pytest.mark.parametrize("num_groups", [1, 2])
def test_both_children_see_all_groups(make_instance: MakeInstance, num_groups: int) -> None:
    instance = make_instance("kv_both", [OFFLOADING], num_groups)
    assert [type(child) for child in instance.children] == [DataDistConnector, OffloadingConnector]
    assert not instance.config.scheduler_config.disable_hybrid_kv_cache_manager
    assert KVConnectorFactory.supports_hma_config(instance.config.kv_transfer_config)


def test_both_children_want_the_same_layout(make_instance: MakeInstance) -> None:
    """MultiConnector raises otherwise, and the engine core does not start."""
    config = make_instance("kv_both", [OFFLOADING]).config
    assert MultiConnector.get_required_kvcache_layout(config) == "LBHNC"


@pytest.mark.parametrize("num_groups", [1, 2])
def test_p_keeps_the_blocks_until_the_lease_has_ended(make_instance: MakeInstance, num_groups: int) -> None:
    p = make_instance("kv_producer", [OFFLOADING], num_groups)
    before = p.free_blocks()
    params = prefill(p)
    remote = parse_remote_prefill(params)
    assert remote.remote_engine_id == "engine-kv_producer"
    # For a model with a sliding window P leaves out the last token, which D computes in any case.
    assert remote.remote_num_tokens == (len(PROMPT) if num_groups == 1 else len(PROMPT) - 1)
    assert len(remote.remote_block_ids) == num_groups
    held = sum(1 for group in remote.remote_block_ids for block in group if block)
    for _ in range(3):
        scheduled, _ = p.step()
        assert p.told(scheduled).ended_leases == ()
    assert before - p.free_blocks() >= held
    release(remote)
    scheduled, _ = p.step()
    assert p.told(scheduled).ended_leases == ("at-p",)
    # OffloadingConnector may hold the request, too, until it has stored it; that is its worker's to say.
    p.step(finished_sending={"at-p"})
    assert p.free_blocks() == before


@pytest.mark.parametrize("others", [[], [OFFLOADING]], ids=["alone", "beside another"])
def test_the_state_of_the_instance_leaves_with_the_step_that_changes_it(
    make_instance: MakeInstance, others: list[dict[str, Any]]
) -> None:
    instance = make_instance("kv_both", others)
    wrap = (lambda stats: MultiKVConnectorStats(data={"DataDistConnector": stats})) if others else lambda stats: stats
    ranks = [WorkerMeter(f"pp0tp{rank}") for rank in range(2)]
    for rank in ranks:
        rank.state({Transport.CMA: 2}, 3)
        instance.step(kv_connector_stats=wrap(rank.take()))
    assert instance.gauges() == {"linked_peers:cma": 4, "quarantined_blocks": 6}
    remote = parse_remote_prefill(prefill(instance))
    held = {"held_leases": 1, "held_blocks": 7, "linked_peers:cma": 4, "quarantined_blocks": 6}
    assert instance.gauges() == held
    release(remote)
    instance.step()
    assert instance.gauges() == {"linked_peers:cma": 4, "quarantined_blocks": 6}
    assert instance.scheduler.has_finished_requests()
    instance.step(finished_sending={"at-p"})
    # The other connector may have work of its own.
    assert others or not instance.scheduler.has_requests(), "no further step would tell anything"


@pytest.mark.parametrize("num_groups", [1, 2])
def test_ours_loads_and_the_other_gets_nothing(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, num_groups: int
) -> None:
    p, d = (
        make_instance("kv_producer", [OFFLOADING], num_groups),
        make_instance("kv_consumer", [OFFLOADING], num_groups),
    )
    allocated: dict[type, list[int]] = {}
    for child in d.children:
        monkeypatch.setattr(child, "update_state_after_alloc", recorder(child, allocated))
    request = d.add("at-d", PROMPT, prefill(p), max_tokens=3)
    scheduled, outputs = d.step()
    assert outputs == {}
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert allocated == {DataDistConnector: [len(PROMPT) - 1], OffloadingConnector: [0]}
    (job,) = d.told(scheduled).pulls
    assert (job.request_id, job.first_token, job.end_token) == ("at-d", 0, len(PROMPT) - 1)
    assert job.local_blocks == tuple(map(tuple, d.tables(request)))
    d.step(finished_recving={"at-d"})
    scheduled, outputs = d.step()
    assert scheduled.num_scheduled_tokens == {"at-d": 1}
    assert outputs["at-d"].new_token_ids == [7]
    # The lease goes back to P once the bytes are here.
    ended: list[str] = []
    wait_until(lambda: bool(ended.extend(p.told(p.step()[0]).ended_leases) or ended), "the end of the lease")
    assert ended == ["at-p"]


def recorder(child: Any, into: dict[type, list[int]]) -> Callable[..., None]:
    original = child.update_state_after_alloc

    def record(request: Request, blocks: Any, num_external_tokens: int) -> None:
        into.setdefault(type(child), []).append(num_external_tokens)
        original(request, blocks, num_external_tokens)

    return record


def test_requests_without_params_are_none_of_ours(make_instance: MakeInstance) -> None:
    instance = make_instance("kv_both", [OFFLOADING], 2)
    instance.add("ordinary", PROMPT)
    scheduled, outputs = instance.step()
    assert instance.told(scheduled) == StepMetadata()
    assert outputs["ordinary"].kv_transfer_params is None


def test_a_failed_load_is_computed_here_or_ended(make_instance: MakeInstance) -> None:
    p, d = make_instance("kv_producer", [OFFLOADING], 2), make_instance("kv_consumer", [OFFLOADING], 2)
    before = d.free_blocks()
    d.add("at-d", PROMPT, prefill(p))
    d.step()
    _, outputs = d.step(finished_recving={"at-d"}, failed_recving={"at-d"})
    assert str(outputs["at-d"].finish_reason) == "error"
    wait_until(lambda: d.step() is not None and d.free_blocks() == before, "the blocks' return")


def test_with_a_child_that_knows_one_group_only(make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM then has one group, and calls request_finished() with one table."""
    p = make_instance("kv_producer", [EXAMPLE])
    assert p.config.scheduler_config.disable_hybrid_kv_cache_manager
    called: list[list[int]] = []
    ours, original = p.children[0], p.children[0].request_finished

    def finished(request: Request, block_ids: list[int]) -> Any:
        called.append(block_ids)
        return original(request, block_ids)

    monkeypatch.setattr(ours, "request_finished", finished)
    monkeypatch.delattr(DataDistConnector, "request_finished_all_groups")
    remote = parse_remote_prefill(prefill(p))
    assert remote.remote_block_ids == (tuple(called[0]),)
    assert len(remote.remote_block_ids[0]) == 7


@pytest.mark.parametrize("max_batch", [1024, 48], ids=["at once", "in chunks"])
@pytest.mark.parametrize("length", range(4 * BLOCK_SIZE, 5 * BLOCK_SIZE + 2))
def test_a_window_that_ends_at_a_block(make_instance: MakeInstance, length: int, max_batch: int) -> None:
    """Of every prompt length, also with (length - window + 1) % block size == 0: D, which feeds the last token itself,
    finds its whole window in blocks that P still had, at the place where P had them."""
    p, d = make_instance("kv_producer", [], 2), make_instance("kv_consumer", [], 2)
    p.scheduler.max_num_scheduled_tokens = max_batch
    prompt = PROMPT[:length]
    p.add("at-p", prompt, dict(TO_P))
    outputs: dict[str, Any] = {}
    while "at-p" not in outputs:
        _, outputs = p.step()
    remote = parse_remote_prefill(outputs["at-p"].kv_transfer_params)
    request = d.add("at-d", prompt, outputs["at-p"].kv_transfer_params, max_tokens=2)
    scheduled, _ = d.step()
    (job,) = d.told(scheduled).pulls
    d.step(finished_recving={"at-d"})
    scheduled, _ = d.step()
    assert scheduled.num_scheduled_tokens == {"at-d": 1}
    for group, reach in enumerate((length, WINDOW)):
        now, loaded = d.tables(request)[group], job.local_blocks[group]
        # All that the last token, at `length - 1`, looks back on.
        for token in range(max(0, length - reach), length - 1):
            index = token // BLOCK_SIZE
            assert now[index], f"token {token} of group {group} lies in no block"
            assert loaded[index] == now[index]
            assert remote.remote_block_ids[group][index], f"P gave token {token} of group {group} back"
