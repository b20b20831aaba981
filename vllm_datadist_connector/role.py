"""`vllm-datadist role`: makes instances prefill for others, decode, or do both, while they serve."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vllm_datadist_connector.arguments import endpoint
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.wakeup import wait_readable

if TYPE_CHECKING:
    from vllm_datadist_connector.side_channel.client import ChannelAnswer, ChannelClient

ROLES: Final = ("prefill", "decode", "both")
MAX_DP_SIZE: Final = 4096

_PATIENCE_S = 5.0
"""An instance keeps the question so long before it says how far it is."""
_ANSWER_S = 5.0
_APPLY_S = 40.0
"""Longer than ranks are given to leave their links, and to say so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("at", nargs="+", type=endpoint, metavar="HOST:PORT", help="side channel of each instance")
    parser.add_argument(
        "--dp-size", type=int, default=1, metavar="N", help="so many data parallel ranks, whose ports count up from it"
    )
    auth = os.environ.get("DATADIST_AUTH_KEY_FILE", "")
    parser.add_argument("--auth", default=auth, metavar="FILE", help="key file that the instances know")
    parser.add_argument(
        "--drain-s", type=float, default=30.0, metavar="S", help="what is under way may go on for so long; then it ends"
    )


def run(options: argparse.Namespace) -> int:
    from vllm_datadist_connector.side_channel.client import open_client

    try:
        ranks = _ranks(options.at, options.dp_size)
        drain_s = _drain_s(options.drain_s)
        client = open_client(Trust(options.auth))
    except (ValueError, OSError) as problem:
        print(f"vllm-datadist role: {problem}", file=sys.stderr)
        return 2
    try:
        return switch(client, options.role, ranks, drain_s)
    finally:
        client.close()


def _drain_s(given: float) -> float:
    if not 0 <= given <= 86400:
        raise ValueError(f"--drain-s: {given}, allowed: numbers from 0 to 86400")
    return given


def _ranks(given: Sequence[Endpoint], dp_size: int) -> list[Endpoint]:
    if not 1 <= dp_size <= MAX_DP_SIZE:
        raise ValueError(f"--dp-size: {dp_size}, allowed: whole numbers from 1 to {MAX_DP_SIZE}")
    if dp_size > 1 and len(given) > 1:
        raise ValueError("--dp-size counts ports up from one address; name that, or all of them and no --dp-size")
    ranks = [at._replace(port=at.port + index) for at in given for index in range(dp_size)]
    if ranks[-1].port > 65535:
        raise ValueError(f"--dp-size: {dp_size} ports from {given[0]} on are beyond 65535")
    return ranks


def switch(client: ChannelClient, role: str, ranks: Sequence[Endpoint], drain_s: float) -> int:
    """All at once; prints what has become of each, and returns 1 if one has not switched."""
    until = time.monotonic() + drain_s + _APPLY_S
    # An instance that hears the same wish again, because its answer was lost, begins nothing anew.
    wishes = {at: secrets.token_hex(16) for at in ranks}

    def ask(at: Endpoint) -> int:
        return client.switch_role(at, wishes[at], role, drain_s, _PATIENCE_S, _ANSWER_S)

    asked = {ask(at): at for at in wishes}
    failed = False
    while asked:
        wait_readable([client.fileno()], None)
        for answer in client.take():
            at = asked.pop(answer.id)
            outcome = _outcome(answer, is_late=time.monotonic() >= until)
            if outcome is None:
                asked[ask(at)] = at
            else:
                failed = failed or bool(outcome)
                print(f"{at}: {outcome or role}", file=sys.stderr if outcome else sys.stdout, flush=True)
    return int(failed)


def _outcome(answer: ChannelAnswer, is_late: bool) -> str | None:
    """Empty: it has switched; else why not. None: it goes on."""
    from vllm_datadist_connector.side_channel.client import Switched

    status = answer.response
    if not isinstance(status, Switched):
        if answer.timed_out and not is_late:
            return None
        return f"not switched, as far as is known: {answer.error}"
    if status.state == "done":
        return ""
    if status.state == "refused":
        return f"stays {status.role}: {status.reason}" if status.role != "none" else f"refused: {status.reason}"
    if not is_late:
        return None
    waits_for = (
        (status.leases, "leases"),
        (status.handoffs, "hand-offs"),
        (status.taken, "requests that it takes"),
        (status.ranks, "ranks"),
    )
    return f"still {status.state}: waits for " + (", ".join(f"{n} {what}" for n, what in waits_for if n) or "nothing")
