"""Requests that an instance prefills itself although it serves with others: nothing fails, and nobody would notice.

Each is counted by its reason. Now and then a line names one of them, and says what to do.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.labels import Reason
from vllm_datadist_connector.log_filter import OthersWords
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.params import (
    FLAGS,
    Unusable,
    wants_remote_decode,
    wants_remote_prefill,
)

logger = logging.getLogger(__name__)
logger.addFilter(OthersWords(most=1000))

LINE_INTERVAL_S: Final = 60.0
"""Between two lines for one reason."""


REASON_OF: Final = {
    Unusable.MALFORMED: Reason.PARAMS,
    Unusable.VERSION: Reason.VERSION,
    Unusable.HOST: Reason.PEER,
    Unusable.NOTHING_HELD: Reason.NOTHING_HELD,
}

_ADVICE: Final = {
    Reason.NO_PARAMS: "let the router ask a prefill instance first (vllm-router: --vllm-pd-disaggregation)",
    Reason.ROLE: "compare the router's lists of instances with their kv_role",
    Reason.SWITCHED: "tell the router what `vllm-datadist role` has made of this instance",
    Reason.FLAG: "a router must send true or false",
    Reason.PARAMS: "a router must hand on all that P has returned, and nothing else",
    Reason.VERSION: "install one release of vllm-datadist-connector on both ends",
    Reason.PEER: "add it to allowed_peers if it is a peer",
    Reason.PROMPT: "a router must send P and D the same prompt",
    Reason.ADAPTER: "load the same adapter on both ends",
    Reason.LEASE_GONE: "raise P's claim_s and lease_s if D may come so late; P's log tells if its KV cache was full",
    Reason.NO_PREFILL: "a router that sends P and D at once must cancel D's request when P's fails",
    Reason.TOO_MANY: "spread the requests over more instances",
}
"""None for what is as it should be: P held nothing."""


class LocalPrefills:
    """Belongs to the scheduler thread."""

    def __init__(self, meter: SchedulerMeter, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter = meter
        self._clock = clock
        self._unsaid: Counter[Reason] = Counter()
        self._next_line: dict[Reason, float] = {}

    def note(self, request_id: str, reason: Reason, detail: str) -> None:
        self._meter.count("local_prefills", 1, reason.value)
        now = self._clock()
        if reason not in _ADVICE:
            return
        if now < self._next_line.get(reason, now):
            self._unsaid[reason] += 1
            return
        more = f" (and {self._unsaid[reason]} others since the last such line)" if self._unsaid[reason] else ""
        logger.warning("request %s is prefilled here: %s; %s%s", request_id, detail, _ADVICE[reason], more)
        self._unsaid[reason] = 0
        self._next_line[reason] = now + LINE_INTERVAL_S

    def note_arrival(self, request_id: str, params: object, duties: Duties, role: str = "") -> None:
        """Notes a request that asks for nothing that this instance does for others.

        Args:
            duties: what it does now.
            role: where it was switched to it, or is being switched from it.
        """
        if params is not None and not isinstance(params, dict):
            self.note(request_id, Reason.PARAMS, "kv_transfer_params are no object")
            return
        values = params or {}
        for flag in FLAGS:
            value = values.get(flag)
            if value is not None and value is not True and value is not False:
                self.note(request_id, Reason.FLAG, f"{flag} is {value!r:.40}")
                return
        if wants_remote_prefill(params):
            if not duties.takes:
                self._note_role(request_id, "a D", "kv_producer", role)
        elif wants_remote_decode(params):
            if not duties.gives:
                self._note_role(request_id, "a P", "kv_consumer", role)
        elif not duties.both and role != "both":
            self.note(request_id, Reason.NO_PARAMS, "it has no kv_transfer_params with a flag")

    def _note_role(self, request_id: str, asked_for: str, kv_role: str, role: str) -> None:
        if role:
            self.note(request_id, Reason.SWITCHED, f"it asks for {asked_for}, and this instance is, or was, {role}")
        else:
            self.note(request_id, Reason.ROLE, f"it asks for {asked_for}, and kv_role is {kv_role}")
