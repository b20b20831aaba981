"""Identities of weights: the same however files are cut, another for other values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.checkpoints import Tensors, make, write

from vllm_datadist_connector.checkpoint import (
    SAMPLE_BYTES,
    SAMPLED_TENSORS,
    CheckpointError,
    identify_bytes,
    identify_tensors,
)


def written(folder: Path, *files: Tensors) -> list[Path]:
    folder.mkdir()
    return [write(folder / f"model-{index}.safetensors", tensors) for index, tensors in enumerate(files)]


def halves(tensors: Tensors) -> Sequence[Tensors]:
    names = list(tensors)
    random.Random(5).shuffle(names)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


@pytest.mark.parametrize("count", [1, 12, SAMPLED_TENSORS + 50])
def test_cut_of_the_files_does_not_matter(tmp_path: Path, count: int) -> None:
    tensors = make(count, size=64)
    whole = identify_tensors(written(tmp_path / "whole", tensors))
    cut = written(tmp_path / "cut", *halves(tensors))
    assert identify_tensors(cut) == identify_tensors(reversed(cut)) == whole
    assert len(whole) == 32


@pytest.mark.parametrize("at", [0, SAMPLE_BYTES - 1, 256, 256 + SAMPLE_BYTES - 1])
@pytest.mark.parametrize("name", ["layers.0.weight", "layers.11.weight"])
def test_other_values_are_other_weights(tmp_path: Path, name: str, at: int) -> None:
    tensors = make()
    other = bytearray(tensors[name])
    other[at] ^= 1
    ours, theirs = written(tmp_path / "a", tensors), written(tmp_path / "b", {**tensors, name: bytes(other)})
    assert identify_tensors(ours) != identify_tensors(theirs)


def test_names_and_types_are_part_of_it(tmp_path: Path) -> None:
    tensors = make(1)
    (value,) = tensors.values()
    paths = [
        write(tmp_path / "a.safetensors", tensors),
        write(tmp_path / "b.safetensors", tensors, kind="F16"),
        write(tmp_path / "c.safetensors", {"layers.1.weight": value}),
    ]
    assert len({identify_tensors([path]) for path in paths}) == 3


def test_small_and_empty_tensors(tmp_path: Path) -> None:
    identities = {
        identify_tensors(written(tmp_path / str(index), {"a": value, "b": b"x" * 200}))
        for index, value in enumerate((b"", b"12", b"34", b"x" * SAMPLE_BYTES))
    }
    assert len(identities) == 4


def test_experts_leave_room_for_the_rest(tmp_path: Path) -> None:
    """Of thousands of experts' tensors none may keep attention from being looked at."""
    experts = {f"layers.0.mlp.experts.{index}.w": b"12" for index in range(5000)}
    identities = {identify_tensors(written(tmp_path / str(seed), {**experts, **make(1, seed=seed)})) for seed in (1, 2)}
    assert len(identities) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (9).to_bytes(8, "little") + b'{"a": 15}',
        (4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe",
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        identify_tensors([path])


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = bytearray(random.Random(2).randbytes(100_000))
    path.write_bytes(content)
    first = identify_bytes([path])
    assert first == identify_bytes([path])
    content[50_000] ^= 1
    path.write_bytes(content)
    assert identify_bytes([path]) != first
    path.write_bytes(content[:-1])
    assert identify_bytes([path]) != first
    for paths in ([], [tmp_path / "absent.gguf"]):
        with pytest.raises(CheckpointError):
            identify_bytes(paths)
