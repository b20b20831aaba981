"""LoRA adapters in values that peers can compare: a name means on either end what was loaded there under it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vllm_datadist_connector.checkpoint import CheckpointError, identify_bytes, identify_tensors, local_directory
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.protocol.params import MAX_ADAPTER

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords())

_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = "adapter_model.safetensors"
_OTHERS: Final = ("adapter_model.bin", "adapter_model.pt")
_MOST_KNOWN: Final = 4096
_MAX_NAME: Final = MAX_ADAPTER - 64

_States = tuple[tuple[int, int], ...]


class _Known(NamedTuple):
    files: tuple[Path, ...]
    states: _States
    digest: str


class Adapters:
    """Identities of adapters, `name@digest`; without files that can be read, `name@`. Reads each adapter once."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def identity_of(self, lora: LoRARequest | None) -> str:
        """Empty for no adapter."""
        return f"{lora.lora_name[:_MAX_NAME]}@{self._digest_of(lora.lora_path)}" if lora is not None else ""

    def _digest_of(self, path: str) -> str:
        known = self._known.get(path)
        # vLLM can load an adapter anew in place, from files that have changed.
        if known is not None and known.states == _states_of(known.files):
            return known.digest
        try:
            files = _files_of(local_directory(path))
            known = _Known(files, _states_of(files), _identify(*files))
        except Exception as error:
            logger.warning("LoRA adapter %s: not readable here, so peers compare its name only: %s", path, error)
            known = _Known((), (), "")
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[path] = known
        return known.digest


def is_same(ours: str, theirs: str) -> bool:
    """Whether two identities are of one adapter: by their files where both ends know them, else by their names."""
    (our_name, _, our_digest), (their_name, _, their_digest) = ours.rpartition("@"), theirs.rpartition("@")
    if our_digest and their_digest:
        return our_digest == their_digest
    return our_name == their_name and bool(ours) == bool(theirs)


def _files_of(directory: Path) -> tuple[Path, Path]:
    for name in (_TENSORS, *_OTHERS):
        if (directory / name).is_file():
            return directory / name, directory / _CONFIG
    raise CheckpointError(f"{directory} has none of {', '.join((_TENSORS, *_OTHERS))}")


def _identify(weights: Path, config: Path) -> str:
    """Scaling and ranks are in the configuration, and so is the path of a base model, which may differ."""
    sample = identify_tensors([weights]) if weights.name == _TENSORS else identify_bytes([weights])
    settings: dict[str, Any] = json.loads(config.read_bytes())
    settings.pop("base_model_name_or_path", None)
    text = f"{sample} {json.dumps(settings, sort_keys=True)}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _states_of(files: tuple[Path, ...]) -> _States:
    try:
        return tuple((state.st_mtime_ns, state.st_size) for state in (path.stat() for path in files))
    except OSError:
        return ((-1, -1),)
