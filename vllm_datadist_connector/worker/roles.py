"""RoleChange: what a rank does when its instance changes its role: leaves all links, then tells its provider.

    order (watcher.py) ──> waits until nothing is under way ──> unlinks, also from those that linked with us ──> SetRole
                                                                   └── a link again, made meanwhile ◄──┘  └──> DECLARE

Belongs to the driver thread, and never waits. Whatever does not end in time fails the change, and the rank goes on.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllm_datadist_connector import _native
from vllm_datadist_connector.metadata import Home
from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient, Watched
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.links import Links
from vllm_datadist_connector.worker.options import LISTEN

logger = logging.getLogger(__name__)

PROVIDER_ROLES: Final = {"prefill": 1, "decode": 2, "both": 3}
"""As LLM-DataDist counts them: prompt, decoder, mix."""

_LOOK_S = 0.01


class _Phase(enum.Enum):
    FINISHING = enum.auto()
    LEAVING = enum.auto()


@dataclass(slots=True)
class _Order:
    role: str
    attempt: int
    until: float
    home: Home
    phase: _Phase = _Phase.FINISHING


@dataclass(slots=True)
class _Word:
    """What is to be declared."""

    home: Home
    attempt: int
    reason: str


class RoleChange:
    def __init__(
        self,
        datadist: _native.LlmDataDist,
        ours: RankGeometry,
        client: ChannelClient,
        links: Links,
        under_way: Callable[[], str],
        leave_all: Callable[[], None],
        answer_timeout_s: float,
    ) -> None:
        """
        Args:
            under_way: what must end first, in words; empty: nothing.
            leave_all: forgets every instance, and begins to unlink from it.
        """
        self._datadist = datadist
        self._client = client
        self._links = links
        self._under_way = under_way
        self._leave_all = leave_all
        self._answer_timeout_s = answer_timeout_s
        self._rank = ours.pp_rank, ours.tp_rank
        # It goes on to listen, whatever its role: peers know the port from its geometry.
        self._options = {LISTEN: str(Endpoint(ours.host, ours.port))} if ours.port else {}
        self._order: _Order | None = None
        self._telling: dict[int, _Word] = {}

    def begin(self, told: Watched, home: Home, now: float) -> None:
        """Whatever was begun before has been given up by who gave the order."""
        self._order = _Order(told.role, told.attempt, now + told.limit_s, home)

    def round(self, now: float) -> None:
        order = self._order
        if order is None:
            return
        if order.phase is _Phase.FINISHING and not self._under_way():
            self._leave_all()
            order.phase = _Phase.LEAVING
        if order.phase is _Phase.LEAVING and self._has_left():
            self._set(order)
        elif now >= order.until:
            left = self._under_way() if order.phase is _Phase.FINISHING else "links that do not go"
            self._end(order, f"there are still {left}")

    def on_answer(self, answer: ChannelAnswer) -> bool:
        """False if it is to something else."""
        word = self._telling.pop(answer.id, None)
        if word is None:
            return False
        if answer.timed_out:
            self._tell(word)
        return True

    def next_wake(self, now: float) -> float | None:
        return now + _LOOK_S if self._order is not None else None

    def _has_left(self) -> bool:
        status, linked = self._datadist.linked_clusters()
        if status != _native.LLM_SUCCESS:
            return True  # SetRole says why
        for cluster_id in linked:
            self._links.unlink_cluster(cluster_id)
        return not linked and not self._links.are_unlinking()

    def _set(self, order: _Order) -> None:
        status = self._datadist.set_role(PROVIDER_ROLES[order.role], self._options)
        if status == _native.LLM_SUCCESS:
            logger.info("all links are gone, and the role is %s", order.role)
            self._end(order, "")
        elif status != _native.LLM_EXIST_LINK:  # a peer's that has come meanwhile goes as the others did
            self._end(order, f"SetRole: {_native.status_name(status)}: {_native.last_error()}")

    def _end(self, order: _Order, reason: str) -> None:
        self._order = None
        if reason:
            logger.warning("the role does not change to %s: %s", order.role, reason)
        self._tell(_Word(order.home, order.attempt, reason))

    def _tell(self, word: _Word) -> None:
        sent = self._client.declare(
            word.home.endpoint, word.home.key, self._rank, word.attempt, word.reason, self._answer_timeout_s
        )
        self._telling[sent] = word
