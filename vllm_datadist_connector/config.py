"""ConnectorConfig: every key of `kv_connector_extra_config`, parsed and checked once."""

from __future__ import annotations

import difflib
import functools
import ipaddress
import os
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from vllm_datadist_connector.protocol.params import MIN_LEASE_S

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
SmallCount = Annotated[int, msgspec.Meta(ge=1, le=64)]


class ConfigError(ValueError):
    """A key of kv_connector_extra_config is unknown or has a value that is not allowed, or an option of vLLM excludes
    the connector."""


class ConnectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of one vLLM instance. Times are seconds."""

    host: str = "127.0.0.1"
    """IP address that the side channel and the engine bind and advertise. Wildcards are refused."""

    side_channel_port: Port = 0
    """Port of the side channel, plus the data parallel index; 0 lets the system choose (peers learn it)."""

    engine_port: Port = 0
    """First port of the engines' listeners, one per worker rank counting up; 0 lets the system choose."""

    transport: Literal["auto", "local", "cma", "tcp"] = "auto"
    """How KV bytes move; auto takes the fastest that reaches the peer."""

    transfer_threads: SmallCount = 2
    """Threads that share the copying of one large transfer."""

    tcp_streams: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """Data connections per direction of a tcp link."""

    huge_pages: bool = True
    """Ask the kernel for huge pages under the KV cache: cma moves it two to three times as fast."""

    queue_threads: SmallCount = 4
    """Native threads per worker: transfers with so many different peers run at once."""

    lease_s: Annotated[float, msgspec.Meta(ge=MIN_LEASE_S, le=3600)] = 30.0
    """P keeps a finished request's blocks so long after the last sign of life of its D."""

    claim_s: Annotated[float, msgspec.Meta(ge=MIN_LEASE_S, le=3600)] = 10.0
    """P keeps them only so long, or lease_s if that is less, before it has heard of a D at all."""

    lease_limit_s: Seconds = 600.0
    """P ends a lease so long after it was granted, however often it was renewed."""

    bidirectional: bool = False
    """D keeps an answered request's blocks, too, and P pulls them when the conversation's next prompt names them."""

    decoder_lease_s: Annotated[float, msgspec.Meta(ge=MIN_LEASE_S, le=3600)] = 480.0
    """bidirectional: D keeps an answered request's blocks so long for the next turn."""

    recompute_threshold: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 64
    """bidirectional: fewer tokens than these of an earlier turn are computed again rather than pulled."""

    recv_deadline_s: Seconds = 60.0
    """D gives a pull so long, from the scheduling of the request to its confirmation."""

    pull_timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 20.0
    """One PullKvBlocks call gives up after so long; its link is then remade."""

    handshake_timeout_s: Seconds = 5.0
    """D waits so long for an answer on the side channel, then asks again if P may be busy, up to the deadline."""

    link_timeout_s: Seconds = 5.0
    """One LinkLlmClusters call gives up after so long; it is made again up to the pull's deadline."""

    peer_backoff_s: Seconds = 1.0
    """After a failed handshake or link, requests for that peer fail at once for so long."""

    peer_ttl_s: Seconds = 3600.0
    """D drops its links with an instance that nobody has asked it to pull from for so long."""

    allowed_peers: Annotated[list[str], msgspec.Meta(max_length=256)] = []
    """IP addresses or networks (CIDR) that kv_transfer_params may send us to; loopback and `host` always are."""

    auth: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """Path of a key file (`vllm-datadist key` makes one), read again when it changes. Peers that are not processes of
    this user on this host must know one of its keys; both ends need one in common. Not given here, nor `insecure`: the
    environment variables DATADIST_AUTH_KEY_FILE and DATADIST_INSECURE (0 or 1) say it."""

    insecure: bool = False
    """Let in whoever can connect. A `host` that is not loopback needs this or `auth`."""

    verify: Literal["off", "log", "fail"] = "off"
    """After a pull, compare a digest of each block with its owner's: a wrong block is logged, or fails the pull."""

    provider: Literal["engine"] = "engine"
    """Implementation of the LLM-DataDist API."""

    def __post_init__(self) -> None:
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            raise ConfigError(f"host: {self.host!r} is not an IP address literal such as '127.0.0.1'") from None
        if address.is_unspecified or address.is_multicast:
            raise ConfigError(f"host: {self.host!r} is not one address of this machine; name the one peers can reach")
        if self.auth and self.insecure:
            raise ConfigError("auth and insecure exclude each other: whom a key keeps out, the other lets in")
        if not (address.is_loopback or self.auth or self.insecure):
            raise ConfigError(
                f"host: {self.host!r} can be reached by other hosts, which needs a key file in 'auth' (made by "
                "`vllm-datadist key FILE`) or 'insecure': true; allowed without: loopback addresses"
            )
        for entry in self.allowed_peers:
            try:
                ipaddress.ip_network(entry, strict=False)
            except ValueError:
                raise ConfigError(
                    f"allowed_peers: {entry!r} is neither an IP address nor a network such as '10.0.0.0/16'"
                ) from None
        if self.lease_limit_s < self.lease_s:
            raise ConfigError(
                f"lease_limit_s: {self.lease_limit_s} is below lease_s ({self.lease_s}); a lease lasts at least lease_s"
            )

    def allows_peer(self, host: str) -> bool:
        """Whether a host named by a router, client or peer may be dialled. Names are refused: only literals match."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        if "%" in host:
            # A scope is text of the client's choosing, and would make one peer look like many.
            return False
        if address.is_loopback or address == ipaddress.ip_address(self.host):
            return True
        return any(address in network for network in _networks(tuple(self.allowed_peers)))


@functools.lru_cache(maxsize=16)
def _networks(entries: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Parsed once: every request of a D asks."""
    return tuple(ipaddress.ip_network(entry, strict=False) for entry in entries)


def _trust_of_environment() -> dict[str, object]:
    """`auth` and `insecure` for deployments whose command lines cannot be changed."""
    trust: dict[str, object] = {}
    if path := os.environ.get("DATADIST_AUTH_KEY_FILE"):
        trust["auth"] = path
    if insecure := os.environ.get("DATADIST_INSECURE"):
        if insecure not in ("0", "1"):
            raise ConfigError(f"environment variable DATADIST_INSECURE: {insecure!r}, allowed: 0, 1")
        trust["insecure"] = insecure == "1"
    return trust


def parse_config(extra: Mapping[str, object] | None) -> ConnectorConfig:
    """Checks `kv_connector_extra_config`.

    Raises:
        ConfigError: names the key, the value and what is allowed; for an unknown key, the nearest known one.
    """
    given = dict(extra or {})
    if not given.keys() & {"auth", "insecure"}:
        given |= _trust_of_environment()
    known = ConnectorConfig.__struct_fields__
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"kv_connector_extra_config: unknown key {key!r}{hint}")
    try:
        return msgspec.convert(given, ConnectorConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        field = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else ""
        value = f" (value {given[field]!r})" if field in given else ""
        raise ConfigError(f"kv_connector_extra_config: {error}{value}") from None
