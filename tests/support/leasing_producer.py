"""A P for tests of D's lease keeper."""

from __future__ import annotations

import threading

from support.channels import BareServer
from support.frames import RELEASED, RENEW, RENEWED, Frame, pack_tokens, unpack_renewal, unpack_tokens
from support.pd import OTHER_TOKEN, TOKEN
from vllm_datadist_connector.scheduler.leases import Leases
from vllm_datadist_connector.side_channel.server import EndedLease


class Producer:
    """A lease table behind a side channel that can be told not to hear."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases = Leases(TOKEN, (16,), 600.0)
        self.table = self._leases.table
        self.seen: list[int] = []
        self.pulling: dict[str, list[bool]] = {}
        """What each renewal of a lease has said."""
        self.deaf_to_releases = 0
        self.deaf_to_renewals = False
        self.answers = threading.Lock()
        """Held by a test, it keeps back the next answer."""
        self.ended: list[EndedLease] = []
        self._server = BareServer(self._answer)
        self.endpoint = self._server.endpoint

    def grant(self, request_id: str = "r") -> str:
        return self._leases.grant(request_id, ((1,),), OTHER_TOKEN, self._lease_s).token

    def count(self, kind: int) -> int:
        return self.seen.count(kind)

    def renewals(self, token: str) -> list[bool]:
        """Whether it was being pulled, of each."""
        return self.pulling.get(token, [])

    def has_ended(self) -> bool:
        self.ended += self.table.take_ended()
        return bool(self.ended)

    def close(self) -> None:
        self._server.close()

    def _answer(self, request: Frame) -> Frame | None:
        self.seen.append(request.kind)
        if request.kind == RENEW:
            tokens, pulling = unpack_renewal(request.body)
            for token in tokens:
                self.pulling.setdefault(token, []).append(pulling)
            if self.deaf_to_renewals:
                return None
            with self.answers:
                pass
            return Frame(RENEWED, request.seq, pack_tokens(self.table.renew(tokens, pulling)))
        tokens = unpack_tokens(request.body)
        if self.deaf_to_releases:
            self.deaf_to_releases -= 1
            return None
        self.table.release(tokens)
        return Frame(RELEASED, request.seq, b"")
