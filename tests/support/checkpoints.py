"""Checkpoints of random tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensors = Mapping[str, bytes]


def write(path: Path, tensors: Tensors, kind: str = "BF16") -> Path:
    """A safetensors file, written by the format's own description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in tensors.items():
        header[name] = {"dtype": kind, "shape": [len(value) // 2], "data_offsets": [at, at + len(value)]}
        at += len(value)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    return path


def make(count: int = 12, size: int = 512, seed: int = 1) -> dict[str, bytes]:
    source = random.Random(seed)
    return {f"layers.{index}.weight": source.randbytes(size) for index in range(count)}
