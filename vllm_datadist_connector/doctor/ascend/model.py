"""How many memory regions a model's KV cache is, before it is loaded: HCCL registers 256 in a process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_datadist_connector.doctor.finding import Finding

MOST_REGIONS = 256
"""HCCL's; a provider that is there says its own."""
MOST_ADDRESSES = 240
"""Of one registration."""
_SPARE = 6
"""Regions that the library may need for itself."""


class Regions(NamedTuple):
    kind: str
    layers: int
    regions: int


def regions_of(config: Mapping[str, Any], pipeline_stages: int = 1) -> Regions:
    """Of a transformers configuration, for the largest pipeline stage. As vllm-ascend allocates: ascend/__init__.py.

    Raises:
        ValueError: it says nothing of layers.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise ValueError("config.json: no num_hidden_layers")
    full = _full_attention_layers(text, layers)
    stage = -(-layers // max(1, pipeline_stages))
    if full < layers:
        # Layers of each kind share raw memory: attention's K and V and the states begin at three places of it.
        shared = max(1, -(-min(full, layers - full) // max(1, pipeline_stages)))
        return Regions("hybrid, linear and full attention", layers, 3 * shared)
    if "index_topk" in text:
        return Regions("sparse attention", layers, 3 * stage)
    if text.get("kv_lora_rank"):
        return Regions("latent attention", layers, 2 * stage)
    return Regions("dense attention", layers, 2 * stage)


def _full_attention_layers(text: Mapping[str, Any], layers: int) -> int:
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return sum("linear" not in str(kind) and "mamba" not in str(kind) for kind in kinds)
    interval = text.get("full_attention_interval")
    return layers // interval if isinstance(interval, int) and interval > 1 else layers


def check_regions(folder: str, pipeline_stages: int, most: int = MOST_REGIONS) -> Finding:
    name = "memory regions"
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("config.json: not an object")  # noqa: TRY301 - as any other that is none
        counted = regions_of(config, pipeline_stages)
    except (OSError, ValueError, TypeError) as error:
        return Finding(name, "warning", f"{folder}: {error}", "give --model the folder that vLLM loads the model from")
    found = f"{counted.kind}, {counted.layers} layers: about {counted.regions} regions a rank, of {most}"
    do = "spread the layers over more pipeline stages (--pipeline-parallel-size)"
    if counted.regions > most:
        return Finding(name, "wrong", found, do)
    if counted.regions > most - _SPARE:
        return Finding(name, "warning", f"{found}; the library may need some itself", do)
    return Finding(name, "ok", found)
