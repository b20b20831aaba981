"""What the scheduler tells the workers in one step: plain values, pickled by vLLM with its own SchedulerOutput."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from vllm_datadist_connector.protocol.params import BlockIds, RemotePrefill
from vllm_datadist_connector.side_channel.endpoint import Endpoint


class PullJob(msgspec.Struct, frozen=True):
    """Tokens [first_token, end_token) of one request, to be pulled from P's blocks (in `remote`) into ours.

    local_blocks[g] begins with the block that holds first_token; of a group of states it is the one block of the state.
    """

    request_id: str
    remote: RemotePrefill
    local_blocks: BlockIds
    first_token: int
    end_token: int
    prompt_digest: str
    from_ourselves: bool
    """P is this very engine core: each rank copies inside its own memory."""
    deadline_s: float
    """Remaining time, of a hand-off until P makes progress; rebased by the receiver, because clocks of different
    processes are never compared."""
    is_handoff: bool = False
    """P's prefill goes on, or did when the request was scheduled: the blocks are learnt from P's side channel."""
    is_pushed: bool = False
    """P may write them into ours, if it can."""

    def __str__(self) -> str:
        """The request as the logs of both ends know it."""
        return f"request {self.request_id} ({self.remote})"


class Home(NamedTuple):
    """The side channel of the ranks' own instance."""

    endpoint: Endpoint
    key: str
    """Only the instance's ranks have it."""


class Chunk(NamedTuple):
    """What a step computes of one P request for which a D waits."""

    handoff: str
    epoch: int
    """Grows when the request was preempted, and what was final is so no more."""
    before: int
    after: int
    """Tokens whose KV is final before and after the step."""


@dataclass(frozen=True, slots=True)
class GivingStep:
    """What P's ranks report progress of, and where: the instance's own side channel."""

    endpoint: tuple[str, int]
    key: str
    """Proof that a report is of a rank of this instance."""
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """Never changed once it is made: NOTHING serves all steps that have nothing, as nearly all have, or ONLY_PULLS."""

    pulls: tuple[PullJob, ...] = ()
    cancels: tuple[str, ...] = ()
    """Requests that ended while their pull was under way: drain it and report them received."""
    ended_leases: tuple[str, ...] = ()
    """Requests whose blocks nobody needs any more: report them sent."""
    left_clusters: tuple[int, ...] = ()
    """Ranks of Ds that were linked with ours and are gone: their links may have stayed."""
    giving: GivingStep | None = None
    home: Home | None = None
    """Where the ranks hear that the instance changes its role; in the first step of one that can."""
    has_stats: bool = False
    """The scheduler has measured something. vLLM 0.23 asks it only in steps for which a worker has."""
    only_pulls: bool = False
    """The step computes nothing, and somebody waits for a pull: vLLM will pause after it, and ask again."""


NOTHING: Final = StepMetadata()
ONLY_PULLS: Final = StepMetadata(only_pulls=True)


@dataclass(frozen=True, slots=True)
class RankHandshake(KVConnectorHandshakeMetadata):
    """A worker rank's RankGeometry in msgpack, on its way to its scheduler process."""

    geometry: bytes
