"""A running instance, asked over its side channel as a D asks a P."""

from __future__ import annotations

import secrets
import statistics
import time

from vllm_datadist_connector.doctor.deployment import Deployment
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.wakeup import wait_readable

_PATIENCE_S = 5.0
_TIMES = 20


def check_peer(endpoint: Endpoint, deployment: Deployment) -> list[Finding]:
    """Greets it, which proves the key both ways and compares versions, then asks for a lease that is none."""
    from vllm_datadist_connector.side_channel.client import Renewed, open_client

    name = f"peer {endpoint}"
    findings = []
    if deployment.pulls and not deployment.config.allows_peer(endpoint.host):
        do = f'add "{endpoint.host}" or its network to `allowed_peers` on D'
        findings.append(Finding(name, "wrong", "D would not dial it: it is not in `allowed_peers`", do))
    try:
        client = open_client(deployment.trust)
    except ValueError:
        return [*findings, Finding(name, "not_applicable", "not asked: the key file is wrong")]
    times = []
    try:
        for _ in range(_TIMES + 1):
            started = time.monotonic()
            client.renew(endpoint, (secrets.token_hex(16),), _PATIENCE_S)
            wait_readable([client.fileno()], started + 2 * _PATIENCE_S)
            answer = next(iter(client.take()), None)
            times.append(time.monotonic() - started)
            if answer is None or not isinstance(answer.response, Renewed):
                why = answer.error or str(answer.response) if answer is not None else "no answer"
                do = (
                    "compare address and firewall, the key files of both ends, and their versions of this package; the"
                    " port is that of P's side channel, which its log names, not that of its HTTP server"
                )
                return [*findings, Finding(name, "wrong", why, do)]
    finally:
        client.close()
    proof = "by the kernel" if not deployment.config.auth else "by a key or, within this host, by the kernel"
    if deployment.config.insecure:
        proof = "by nothing (insecure)"
    found = (
        f"answers, protocol version {PROTOCOL_VERSION}; greeting {times[0] * 1e3:.2f} ms, round trip"
        f" {statistics.median(times[1:]) * 1e3:.2f} ms; proven {proof}"
    )
    do = "for bandwidth run `vllm-datadist selftest` on both hosts"
    return [*findings, Finding(name, "ok", found, do)]
