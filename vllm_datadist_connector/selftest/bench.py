"""What the items work with: pairs of fresh endpoints on two ends, and what can become of an item."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vllm_datadist_connector.selftest.party import Address, Link, Outcome
from vllm_datadist_connector.selftest.remote import ANSWER_S, Remote, Wire

Numbers: TypeAlias = dict[str, object]
Move: TypeAlias = tuple[int, int, int]
"""Offset in the source, offset in the destination, bytes."""

Status: TypeAlias = Literal["ok", "wrong", "skipped"]

LINK_MS = 60_000
_ROUND_TRIP_S = 10.0


class SkippedError(Exception):
    """The item does not apply here; says why."""


class WrongError(Exception):
    """The item found what must not be; says what, and the numbers that it had by then."""

    def __init__(self, what: str, numbers: Numbers | None = None) -> None:
        super().__init__(what)
        self.numbers = numbers or {}


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    status: Status
    note: str
    numbers: Numbers
    seconds: float


@dataclass(frozen=True, slots=True)
class Settings:
    """How the providers of both ends are made."""

    provider: str
    pull_timeout_ms: int
    engine_options: dict[str, str] = field(default_factory=dict)
    """Given where the provider takes options of the engine's."""
    large: bool = False
    watch_s: float = 3.0
    links: int = 16
    patience_s: float = 30.0
    """For what a provider is to notice by itself."""


@dataclass(frozen=True, slots=True)
class Place:
    """One of the two ends: where its parties run, and what memory they have."""

    host: str
    memory: str
    start: Callable[[], Wire]

    @property
    def device(self) -> str:
        """As the option llm.DeviceId wants it."""
        index = self.memory.partition(":")[2]
        return index or "0"


class End:
    """One endpoint of the provider."""

    def __init__(self, place: Place, settings: Settings, cluster_id: int) -> None:
        self.place, self._settings = place, settings
        self.cluster_id = cluster_id
        self.remote = Remote(place.start())
        self.address = Address(cluster_id=cluster_id, host=place.host, port=0)
        self.capabilities: dict[str, int] = {}

    def begin_open(self, expandable: bool | None) -> None:
        self.remote.begin(
            "open",
            provider=self._settings.provider,
            memory=self.place.memory,
            cluster_id=self.cluster_id,
            expandable=expandable,
        )

    def end_open(self, listen: bool) -> None:
        """
        Raises:
            WrongError: Initialize failed.
        """
        self.capabilities = self.remote.end(dict[str, int])
        options = {
            "llm.DeviceId": self.place.device,
            "llm.SyncKvCacheWaitTime": str(self._settings.pull_timeout_ms),
        }
        if self.capabilities["engine_options"]:
            options |= self._settings.engine_options
        begun = self.call("initialize", Outcome, host=self.place.host, listen=listen, options=options)
        port = must(begun, "Initialize").value
        self.address = Address(cluster_id=self.cluster_id, host=self.place.host, port=port)

    def call(self, do: str, kind: Any, within_s: float = ANSWER_S, **args: object) -> Any:
        return self.remote.ask(do, kind, within_s=within_s, **args)

    def allocate(self, name: str, size: int, seed: int | None) -> int:
        return int(self.call("allocate", int, name=name, size=size, seed=seed))

    def try_register(self, name: str, block_bytes: int, blocks: int, offset: int = 0, repeat: int = 1) -> Outcome:
        outcome: Outcome = self.call(
            "register", Outcome, name=name, offset=offset, blocks=blocks, block_bytes=block_bytes, repeat=repeat
        )
        return outcome

    def register(self, name: str, block_bytes: int, blocks: int, offset: int = 0) -> int:
        return must(self.try_register(name, block_bytes, blocks, offset), "RegisterKvCache").value

    def link(self, peer: End) -> Outcome:
        outcome: Outcome = self.call("link", Outcome, _longer(LINK_MS), peer=peer.address, timeout_ms=LINK_MS)
        return outcome

    def unlink(self, peer: End, force: bool = False) -> Outcome:
        outcome: Outcome = self.call(
            "unlink", Outcome, _longer(LINK_MS), peer=peer.address, timeout_ms=LINK_MS, force=force
        )
        return outcome

    def pull(self, peer: End, cache: int, to: int, blocks: Sequence[int], to_blocks: Sequence[int]) -> Outcome:
        args = self.pull_arguments(peer, cache, to, blocks, to_blocks)
        outcome: Outcome = self.call("pull", Outcome, self.pull_s, **args)
        return outcome

    def pull_arguments(
        self, peer: End, cache: int, to: int, blocks: Sequence[int], to_blocks: Sequence[int]
    ) -> dict[str, object]:
        sides = {"source": peer.cluster_id, "cache": cache, "to": to}
        return {**sides, "blocks": list(blocks), "to_blocks": list(to_blocks)}

    @property
    def pull_s(self) -> float:
        return _longer(self._settings.pull_timeout_ms)

    def query(self, peer: End) -> Link | None:
        """None, too, where the provider does not tell of links."""
        if not self.capabilities["reports_links"]:
            return None
        found: Link | None = self.call("query", Link | None, cluster_id=peer.cluster_id)
        return found

    def wrong_bytes(self, name: str, seed: int, source_seed: int, moves: Sequence[Move]) -> int:
        return int(self.call("wrong", int, name=name, seed=seed, source_seed=source_seed, moves=list(moves)))

    def kill(self) -> None:
        self.remote.kill()


def _longer(timeout_ms: int) -> float:
    """Who waits for a call with that time limit, in another process."""
    return timeout_ms / 1000 + _ROUND_TRIP_S


def must(outcome: Outcome, what: str) -> Outcome:
    """
    Raises:
        WrongError: it did not succeed.
    """
    if not outcome.ok:
        raise WrongError(f"{what}: {outcome.status}{f': {outcome.why}' if outcome.why else ''}")
    return outcome


def moves_of(blocks: Sequence[int], to_blocks: Sequence[int], block_bytes: int, offset: int = 0) -> list[Move]:
    """What a pull of blocks does, `offset` being where the registration begins on either side."""
    pairs = zip(blocks, to_blocks, strict=True)
    return [(offset + block * block_bytes, offset + to * block_bytes, block_bytes) for block, to in pairs]


@dataclass(slots=True)
class Bench:
    """Makes ends: A, on this host, pulls; B is its peer, on either."""

    a: Place
    b: Place
    settings: Settings
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(secrets.randbits(40) << 20))

    @contextlib.contextmanager
    def pair(self, expandable: bool | None = None) -> Iterator[tuple[End, End]]:
        with self.ends(self.a, self.b, expandable=expandable) as (first, second):
            yield first, second

    @contextlib.contextmanager
    def ends(self, *places: Place, expandable: bool | None = None) -> Iterator[list[End]]:
        """One end at each place, all of which listen; their processes start together, and are gone afterwards.

        Args:
            expandable: whether their memory comes in segments that grow; None: as the environment has it.
        """
        ends: list[End] = []
        try:
            for place in places:
                ends.append(End(place, self.settings, next(self._ids) + 1))
                ends[-1].begin_open(expandable)
            for end in ends:
                end.end_open(listen=True)
            yield ends
        finally:
            for end in ends:
                end.kill()
