"""Identities of weights, sampled from the files that they are loaded from.

The files and not the loaded tensors, because how these lie depends on parallelism, fused layers and kernels, and vLLM
shows a connector none of them. Tensors are taken by name, so that it does not matter either how many files there are.
Reading a few hundred bytes at a few hundred places costs milliseconds, and what trained or merged a model changed
nearly every value of the tensors that it touched.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

SAMPLED_TENSORS: Final = 256
SAMPLE_BYTES: Final = 64
"""At the start and in the middle of a tensor."""
_MAX_HEADER_BYTES: Final = 100 << 20
"""The format's own limit."""
_EXPERT: Final = ".experts."
"""Experts' tensors are taken last: in a mixture of experts they would leave no room for attention."""


class CheckpointError(ValueError):
    """The files of a checkpoint cannot be read; says which and why."""


class _Place(NamedTuple):
    """What a file says of a tensor; looked into only if the tensor is sampled: there may be a hundred thousand."""

    path: Path
    data_begin: int
    entry: Any


def local_directory(name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Where a loader has found a model or adapter: the path itself, or a copy of what a hub has under the name.

    Raises:
        OSError, ValueError: there is none here; nothing is fetched.
    """
    place = Path(name).expanduser()
    if place.exists():
        return place
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))


def identify_tensors(files: Iterable[Path]) -> str:
    """32 hex digits of safetensors files, however the tensors are dealt out among them.

    Raises:
        CheckpointError: a file is not readable or no safetensors file; or there are no tensors.
    """
    places: dict[str, _Place] = {}
    for path in files:
        data_begin, header = _header_of(path)
        places.update((name, _Place(path, data_begin, entry)) for name, entry in header.items())
    places.pop("__metadata__", None)
    if not places:
        raise CheckpointError("no tensors")
    state = hashlib.blake2b(digest_size=16)
    chosen = {name: places[name] for name in heapq.nsmallest(SAMPLED_TENSORS, places, key=_rank)}
    for name, kind, sample in sorted(_samples(chosen)):
        for part in (name.encode(errors="surrogatepass"), kind.encode(), sample):
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


def _header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors' bytes begin, what is said of each tensor)"""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # No bytes are no JSON: a length that is none is refused as such.
            header = msgspec.json.decode(file.read(length if length <= _MAX_HEADER_BYTES else 0))
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is no object")
    return 8 + length, header


def _samples(tensors: Mapping[str, _Place]) -> Iterator[tuple[str, str, bytes]]:
    """(name, type and shape, bytes), file by file, so that each is opened once."""
    for path, group in groupby(sorted(tensors, key=lambda name: tensors[name].path), lambda name: tensors[name].path):
        try:
            with path.open("rb") as file:
                for name in group:
                    yield name, *_sample(file.fileno(), *tensors[name][1:])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path.name}: {error!r}") from error


def _sample(fd: int, data_begin: int, entry: Any) -> tuple[str, bytes]:
    begin, end = entry["data_offsets"]
    count = min(SAMPLE_BYTES, end - begin)
    middle = min((begin + end) // 2, end - count)
    sampled = os.pread(fd, count, data_begin + begin) + os.pread(fd, count, data_begin + middle)
    return f"{entry['dtype']} {entry['shape']}", sampled
