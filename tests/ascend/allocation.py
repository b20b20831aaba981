"""KV caches from vllm-ascend's own allocation, without the rest of its model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import vllm_ascend.worker.worker  # noqa: F401  # first: vllm-ascend's modules import each other in circles
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, KVCacheTensor, MLAAttentionSpec
from vllm_ascend.attention.attention_v1 import AscendAttentionBackend
from vllm_ascend.attention.mla_v1 import AscendMLABackend
from vllm_ascend.attention.sfa_v1 import AscendSFABackend
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

ALIGNMENT = 2 << 20
"""Of each allocation, if there is a KV connector."""


@dataclass(frozen=True)
class Model:
    """What the model runner is asked to allocate.

    The layers of a group have a spec in common. With `shares_memory`, those at the same place of their groups are one
    allocation; otherwise each layer has its own.
    """

    groups: Mapping[tuple[str, ...], KVCacheSpec]
    num_blocks: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    shares_memory: bool = False
    model_type: str = "any"
    index_head_dim: int = 128
    latent: tuple[int, int] = (512, 64)
    """kv_lora_rank and qk_rope_head_dim."""

    @property
    def specs(self) -> dict[str, KVCacheSpec]:
        return {layer: spec for layers, spec in self.groups.items() for layer in layers}

    def config(self) -> KVCacheConfig:
        if self.shares_memory:
            shared: Sequence[tuple[str, ...]] = list(zip(*self.groups, strict=True))
        else:
            shared = [(layer,) for layers in self.groups for layer in layers]
        tensors = [
            KVCacheTensor(size=self.num_blocks * self.specs[layers[0]].page_size_bytes, shared_by=list(layers))
            for layers in shared
        ]
        groups = [KVCacheGroupSpec(list(layers), spec) for layers, spec in self.groups.items()]
        return KVCacheConfig(num_blocks=self.num_blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)


def allocate(model: Model) -> dict[str, Any]:
    """What initialize_kv_cache() hands to the connector."""
    config = model.config()
    runner = NPUModelRunner.__new__(NPUModelRunner)
    forward_context = {layer: _module(model, spec) for layer, spec in model.specs.items()}
    forward_context.update({layer: SimpleNamespace(kv_cache=None) for layer in model.aliases})
    compilation = SimpleNamespace(static_forward_context=forward_context)
    is_sparse = any(getattr(spec, "sparse_head_dim", None) for spec in model.specs.values())
    backend = _backend(model, is_sparse)
    hf_config = SimpleNamespace(model_type=model.model_type, index_head_dim=model.index_head_dim, num_hidden_layers=2)
    runner.__dict__.update(
        vllm_config=SimpleNamespace(
            kv_transfer_config=SimpleNamespace(is_kv_consumer=False), compilation_config=compilation, quant_config=None
        ),
        model_config=SimpleNamespace(hf_text_config=hf_config, hf_config=hf_config),
        compilation_config=compilation,
        device=torch.device("cpu"),
        use_sparse=is_sparse,
        use_compress=model.model_type == "deepseek_v4",
        c8_k_cache_dtype=torch.int8,
        c8_k_scale_cache_dtype=torch.float16,
        runner_only_attn_layers=set(),
        shared_kv_cache_layers=dict(model.aliases),
        kv_cache_config=config,
        attn_backend=backend,
        attn_groups=[
            [SimpleNamespace(backend=backend, kv_cache_spec=spec, layer_names=list(layers))]
            for layers, spec in model.groups.items()
        ],
        use_hybrid_blocks=len(model.groups) > 1,
        enable_hamming_sparse=False,
        kv_caches=[],
    )
    caches: dict[str, Any] = runner.initialize_kv_cache_tensors(config)
    return caches


def _module(model: Model, spec: KVCacheSpec) -> Any:
    """A layer as far as its sizes are asked for."""
    if not isinstance(spec, MLAAttentionSpec):
        return SimpleNamespace(kv_cache=None)
    module = MLAAttention.__new__(MLAAttention)
    torch.nn.Module.__init__(module)
    module.kv_lora_rank, module.qk_rope_head_dim = model.latent
    return module


def _backend(model: Model, is_sparse: bool) -> Any:
    if is_sparse or model.model_type == "deepseek_v4":
        return AscendSFABackend
    has_latents = any(isinstance(spec, MLAAttentionSpec) for spec in model.specs.values())
    return AscendMLABackend if has_latents else AscendAttentionBackend


def record(model: Model) -> dict[str, Any]:
    """As data/ascend_layouts.json has it."""
    caches = allocate(model)
    storages: dict[int, tuple[int, int]] = {}  # by where an allocation begins: its number, its size

    def locate(tensor: torch.Tensor) -> list[Any]:
        storage = tensor.untyped_storage()
        begin = -(-storage.data_ptr() // ALIGNMENT) * ALIGNMENT
        number, _ = storages.setdefault(begin, (len(storages), storage.nbytes() - ALIGNMENT))
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [number, tensor.data_ptr() - begin, dtype, list(tensor.shape), list(tensor.stride())]

    layers = {layer: [type(parts).__name__, *map(locate, parts)] for layer, parts in caches.items()}
    return {
        "groups": [list(group) for group in model.groups],
        "storages": [size for _, size in storages.values()],
        "layers": layers,
    }
