"""Identities of weights, sampled from the files that they are loaded from.

The files and not the loaded tensors, because how these lie depends on parallelism, fused layers and kernels, and vLLM
shows a connector none of them. Tensors are taken by name, so that it does not matter either how many files there are.
Reading a few hundred bytes at a few hundred places costs milliseconds, and what trained or merged a model changed
nearly every value of the tensors that it touched.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

SAMPLED_TENSORS: Final = 256
SAMPLE_BYTES: Final = 64
"""At the start and in the middle of a tensor."""
_MAX_HEADER_BYTES: Final = 100 << 20
"""The format's own limit."""
_EXPERT: Final = ".experts."
"""Experts' tensors are taken last: in a mixture of experts they would leave no room for attention."""


class CheckpointError(ValueError):
    """The files of a checkpoint cannot be read; says which and why."""


class _Tensor(NamedTuple):
    path: Path
    kind: str
    begin: int
    size: int


def identify_tensors(files: Iterable[Path]) -> str:
    """32 hex digits of safetensors files, however the tensors are dealt out among them.

    Raises:
        CheckpointError: a file is not readable or no safetensors file; or there are no tensors.
    """
    tensors: dict[str, _Tensor] = {}
    for path in files:
        tensors.update(_tensors_of(path))
    if not tensors:
        raise CheckpointError("no tensors")
    state = hashlib.blake2b(digest_size=16)
    chosen = heapq.nsmallest(SAMPLED_TENSORS, tensors, key=_rank)
    samples = dict(_samples(tensors, chosen))
    for name in sorted(chosen):
        for part in (name.encode(errors="surrogatepass"), tensors[name].kind.encode(), samples[name]):
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
    return state.hexdigest()


def identify_bytes(files: Iterable[Path]) -> str:
    """32 hex digits of files of another format: of each its size, and bytes at as many places as of all tensors.

    Raises:
        CheckpointError: a file is not readable; or there are none.
    """
    state = hashlib.blake2b(digest_size=16)
    paths = sorted(files, key=lambda path: path.name)
    if not paths:
        raise CheckpointError("no files")
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                state.update(size.to_bytes(8, "little"))
                for place in range(SAMPLED_TENSORS):
                    state.update(os.pread(file.fileno(), SAMPLE_BYTES, size * place // SAMPLED_TENSORS))
        except OSError as error:
            raise CheckpointError(str(error)) from error
    return state.hexdigest()


def _rank(name: str) -> tuple[bool, int, str]:
    return _EXPERT in name, zlib.crc32(name.encode(errors="surrogatepass")), name


def _tensors_of(path: Path) -> Iterator[tuple[str, _Tensor]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # No bytes are no JSON: a length that is none is refused as such.
            header: dict[str, Any] = json.loads(file.read(length if length <= _MAX_HEADER_BYTES else 0))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            kind = f"{entry['dtype']} {entry['shape']}"
            yield name, _Tensor(path, kind, 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _samples(tensors: dict[str, _Tensor], chosen: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """File by file, so that each is opened once."""
    places = sorted((tensors[name].path, name) for name in chosen)
    try:
        for path, group in groupby(places, key=itemgetter(0)):
            with path.open("rb") as file:
                for _, name in group:
                    _, _, begin, size = tensors[name]
                    count = min(SAMPLE_BYTES, size)
                    middle = min(size // 2, size - count)
                    fd = file.fileno()
                    yield name, os.pread(fd, count, begin) + os.pread(fd, count, begin + middle)
    except OSError as error:
        raise CheckpointError(str(error)) from error
