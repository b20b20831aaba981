"""Everything that depends on vLLM's version or platform. Each shim says when it can go."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from vllm_datadist_connector.protocol.handshake import K_TRANSPOSED, NZ, PLAIN

logger = logging.getLogger(__name__)

TransferResults: Any = getattr(_base, "KVConnectorTransferResults", None)
"""Class of get_transfer_results()'s value; None before vLLM 0.30, where failed loads travel as invalid block ids.
Goes when 0.30 is the oldest supported version."""

LOADS_MAY_PRECEDE_ZEROING = hasattr(_base.KVConnectorBase_V1, "get_loaded_kv_cache_group_ids")
"""Whether vLLM leaves blocks alone that are loaded into. Before, it zeroes a step's new blocks between the hooks
handle_preemptions and start_load_kv. Goes when the oldest supported version has the hook."""


def splits_batches(parallel_config: Any) -> bool:
    """Whether a layer runs several times in a step, each time for some of the step's requests."""
    return bool(getattr(parallel_config, "use_ubatching", False) or getattr(parallel_config, "enable_dbo", False))


def guard_failed_loads() -> None:
    """Keeps the engine core alive when a load of a model with several KV cache groups fails. Idempotent; never raises.

    Symptom: up to vLLM 0.29, Scheduler._handle_invalid_blocks takes each request's blocks for those of one group, and
    the first invalid block ends the engine core with "too many values to unpack". For our connector and several groups
    it is replaced; everything else stays vLLM's. Goes when 0.30 is the oldest supported version: there failed loads
    are reported by request.
    """
    if TransferResults is not None:
        return
    try:
        from vllm.v1.core.sched.scheduler import Scheduler

        original = Scheduler._handle_invalid_blocks
        parameters = list(inspect.signature(original).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        logger.critical("a failed load of a model with several KV cache groups will end this vLLM: %s", error)
        return
    if getattr(original, "__module__", "") == __name__:
        return
    if parameters != ["self", "invalid_block_ids", "num_scheduled_tokens"]:
        logger.critical("a failed load of a model with several KV cache groups will end this vLLM: %s", parameters)
        return

    def handle_invalid_blocks(self: Any, invalid_block_ids: set[int], num_scheduled_tokens: dict[str, int]) -> Any:
        if len(self.kv_cache_config.kv_cache_groups) == 1 or not _is_ours(self.connector):
            return original(self, invalid_block_ids, num_scheduled_tokens)
        return _end_failed_loads(self, invalid_block_ids)

    Scheduler._handle_invalid_blocks = handle_invalid_blocks


def _is_ours(connector: Any) -> bool:
    """By where its class is from, because the connector imports this module."""
    return any(base.__module__.startswith(f"{__package__}.") for base in type(connector).__mro__)


def _end_failed_loads(scheduler: Any, invalid_block_ids: set[int]) -> set[str]:
    """Does for several groups what vLLM does for one; returns the requests that vLLM shall end with an error.

    Blocks tell whose load it was: all groups draw from one pool, and a block belongs to one request until its load has
    ended, because only then vLLM lets others find it. Such a request starts from nothing: what one group has is of no
    use without the others.
    """
    from vllm.v1.request import RequestStatus

    manager = scheduler.kv_cache_manager
    # The null block stands in every request for what its sliding window has left behind.
    invalid = invalid_block_ids - {manager.block_pool.null_block.block_id}
    loading = [each for each in scheduler.requests.values() if each.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
    failed: set[str] = set()
    for request in loading:
        if not invalid.isdisjoint(chain.from_iterable(manager.get_block_ids(request.request_id))):
            request.num_computed_tokens = 0
            failed.add(request.request_id)
    if not failed:
        return failed  # of requests that ended meanwhile
    if not scheduler.recompute_kv_load_failures:
        logger.error("KV load failure: ending %d requests: %s", len(failed), sorted(failed))
        return failed
    logger.warning("KV load failure: computing %d requests here: %s", len(failed), sorted(failed))
    # What vLLM looks into when all ranks have reported the load: it frees the blocks and schedules the request anew.
    scheduler.failed_recving_kv_req_ids |= failed
    return set()


def watch_pauses() -> None:
    """Tells our connectors of vLLM's pauses, by their _set_paused(). Idempotent; never raises.

    Symptom: /pause and /sleep wait until no request holds blocks, and a connector that keeps some for a D hears nothing
    of it: an operator waits for leases to run out. Goes when vLLM tells connectors. Without it, that is what happens.
    """
    try:
        from vllm.v1.core.sched.scheduler import Scheduler

        original = Scheduler.set_pause_state
        parameters = list(inspect.signature(original).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        parameters = []
    if parameters != ["self", "pause_state"]:
        logger.info("this vLLM says nothing of pauses: a pause of a P waits until its leases have ended")
        return
    if getattr(original, "__module__", "") == __name__:
        return

    def set_pause_state(self: Any, pause_state: Any) -> None:
        original(self, pause_state)
        connector = self.connector
        for each in getattr(connector, "_connectors", [connector]):
            if _is_ours(each):
                each._set_paused(pause_state != type(pause_state).UNPAUSED)

    Scheduler.set_pause_state = set_pause_state


def cache_hit_source() -> Any:
    """Label under which vLLM 0.32+ counts tokens that came from a peer; None before. Goes with 0.31."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


def heads_first_layout() -> str:
    """vLLM's name of the layout in which each head of a block keeps its tokens together. MultiConnector compares names:
    with another than the other connectors use it ends the engine. Goes when 0.23's "HND" is no longer supported."""
    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:
        return "HND"
    return str(KVCacheLayout.LBHNC.name)


def transfer_groups(kv_cache_config: Any) -> Sequence[Any]:
    """KV cache groups that cross instances. 0.29+ says which; before, all. Goes with 0.28."""
    groups: Sequence[Any] = getattr(kv_cache_config, "transfer_groups", None) or kv_cache_config.kv_cache_groups
    return groups


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """Indices of transfer_groups(). Goes with 0.28."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(ids) if ids is not None else tuple(range(len(kv_cache_config.kv_cache_groups)))


def returns_routed_experts(vllm_config: Any) -> bool:
    """Whether --enable-return-routed-experts is given. 0.23 has it in the model's configuration; that goes with it."""
    configs = (getattr(vllm_config, name, None) for name in ("aux_output_config", "model_config"))
    return any(getattr(config, "enable_return_routed_experts", False) for config in configs)


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The KVCacheSpec of one layer of a group: a group of like layers that differ in size has one for each."""
    specs: dict[str, Any] = getattr(group_spec, "kv_cache_specs", None) or {}
    return specs.get(layer, next(iter(specs.values()), group_spec))


def tokens_per_entry(spec: Any) -> int:
    """How many tokens an entry of vllm-ascend's compressed latents stands for: there a block counts entries, and the
    last ones of a prompt are not written. vLLM's own blocks count tokens."""
    if not isinstance(spec, MLAAttentionSpec) or type(spec).__module__.startswith("vllm."):
        return 1
    return int(getattr(spec, "compress_ratio", 1))


def is_conv_state_dim_first() -> bool:
    """Whether a convolution's state is stored as (channels, tokens), not (tokens, channels). 0.23 may lack the choice,
    and stores (tokens, channels). Goes with it."""
    try:
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first as dim_first
    except ImportError:
        return False
    return bool(dim_first())


def prompt_tail(vllm_config: Any, forgets: bool) -> int:
    """How many of a prompt's last tokens P must not compute, because D computes them itself from what precedes them.

    One if the model `forgets`: where a state is overwritten by each token, or a block is given back once a window has
    left it, which after the last token may be one that the last token itself looks back on. And as many as the modules
    of a multi-token predictor read ahead: on P they would read tokens that were never verified. Before vLLM 0.31 there
    is no such margin; the default goes with it.
    """
    return max(int(forgets), int(getattr(vllm_config, "num_prefill_lookahead_tokens", 0)) - 1)


def drop_prompt_tail(request: Any, count: int) -> None:
    """Shortens the prompt of a P request.

    vLLM has no notion of it: NixlConnector shortens requests in the same way. Goes when vLLM lets a connector say where
    a prefill ends.
    """
    if request.num_prompt_tokens <= count or not request.prompt_token_ids:
        return
    del request.prompt_token_ids[-count:]
    del request._all_token_ids[-count:]
    request.num_prompt_tokens -= count
    request.max_tokens = 1


def data_parallel_index(parallel_config: Any) -> int:
    """Which engine core of the instance this is, over all nodes where vLLM says so."""
    index = getattr(parallel_config, "data_parallel_index", None)
    return int(index if index is not None else parallel_config.data_parallel_rank)


def is_npu() -> bool:
    """Whether vLLM runs on Ascend NPUs, by vllm-ascend."""
    from vllm.platforms import current_platform

    return bool(current_platform.device_type == "npu")


def skips_states(vllm_config: Any) -> bool:
    """Whether the scheduler takes a prompt whose tokens are in the prefix cache for one whose state is there, too.

    Symptom: vllm-ascend's recompute schedulers look up tokens alone, because a connector brings the state with what is
    missing. Where nothing is missing, or nobody has it, they go on from no state: wrong answers. vLLM 0.32 looks again
    then. Goes when vllm-ascend's do.
    """
    chosen = getattr(getattr(vllm_config, "scheduler_config", None), "scheduler_cls", None)
    module = chosen if isinstance(chosen, str) else getattr(chosen, "__module__", "")
    is_recompute = module.startswith("vllm_ascend.core.recompute_scheduler")
    return is_recompute and bool(vllm_config.cache_config.enable_prefix_caching)


def kv_packing(vllm_config: Any, kv_cache_spec: Any) -> str:
    """How a platform packs a head's K and V inside a block, beyond the layout's name.

    vLLM's CPU attention keeps them in the order of an instruction set: blocks of two hosts are interchangeable only if
    they chose the same. Which order "vec" and "vec16" mean was found by experiment with 0.23 and 0.32, see
    tests/unit/test_cpu_packing.py. vllm-ascend keeps MLA's latent in tiles if enable_kv_nz asks for it, which only a D
    may. Other platforms do not pack.
    """
    from vllm.platforms import current_platform

    if is_npu() and isinstance(kv_cache_spec, MLAAttentionSpec):
        return NZ if (vllm_config.additional_config or {}).get("enable_kv_nz") else PLAIN
    if not current_platform.is_cpu() or not hasattr(kv_cache_spec, "num_kv_heads"):
        return PLAIN
    if isinstance(kv_cache_spec, MLAAttentionSpec):
        return PLAIN
    isa, cache_dtype = _cpu_isa(vllm_config, kv_cache_spec), vllm_config.cache_config.cache_dtype
    quantised = "fp8" in str(cache_dtype)
    return K_TRANSPOSED if isa in ("vec", "vec16") and not quantised else f"cpu-{isa}-{cache_dtype}"


def _cpu_isa(vllm_config: Any, kv_cache_spec: Any) -> str:
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return "unknown"
    sizes = (kv_cache_spec.dtype, kv_cache_spec.block_size, getattr(kv_cache_spec, "head_size", None))
    try:
        return str(_get_attn_isa(*sizes, vllm_config.cache_config.cache_dtype))
    except TypeError:
        # 0.23 takes (dtype, block_size, head_size). Goes with it.
        return str(_get_attn_isa(*sizes))


def set_gauge(gauge: Any, value: float, at: float) -> None:
    """Sets a gauge to what it was `at` that time, in seconds of the Unix epoch.

    Symptom: of the processes of one vLLM, prometheus_client shows what was set last, and an API server that is late
    with an older value would overrule the newest for good. prometheus_client keeps the time, but lets nobody say it.
    Ray's gauges have none. Goes when prometheus_client's Gauge.set() takes a time.
    """
    value_of = getattr(gauge, "_value", None)
    if value_of is None:
        gauge.set(value)
    else:
        value_of.set(float(value), timestamp=at)


def share_logging() -> None:
    """Sends our log lines where vLLM's go: it configures the handlers of its own logger only."""
    ours, theirs = logging.getLogger(__package__), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = False


def prepare_process() -> None:
    """Cures a crash of vLLM's CPU build on hosts with AMX.

    Symptom: a bfloat16 server whose first batch has at most four tokens (every decode instance) dies of SIGILL without
    a word. vLLM's CPU attention uses AMX tiles without asking the kernel for them; so far only a oneDNN matmul asked.
    Goes when vLLM asks by itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not _has_amx():
        return
    import torch

    torch.cpu._init_amx()


def _has_amx() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            return any("amx_tile" in line for line in info if line.startswith("flags"))
    except OSError:
        return False


def drafts_late(vllm_config: Any) -> bool:
    """Whether a drafter with a KV cache may run when the step's tokens are known. Asynchronous scheduling hands tokens
    over in the order of the device's stream, after it."""
    speculative = vllm_config.speculative_config
    has_model = speculative is not None and "ngram" not in str(speculative.method)
    return has_model and not vllm_config.scheduler_config.async_scheduling


def streams(device_type: str) -> Any:
    """The module of torch that has a device's Event and current_stream(), such as torch.npu."""
    import torch

    return getattr(torch, device_type)
