"""ConnectorConfig: every key of `kv_connector_extra_config`, parsed and checked once."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import ipaddress
import os
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Final, Literal

import msgspec
import msgspec.inspect
import msgspec.structs

from vllm_datadist_connector.protocol.contract import OVERRIDABLE
from vllm_datadist_connector.protocol.params import MIN_LEASE_S

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
SmallCount = Annotated[int, msgspec.Meta(ge=1, le=64)]


class ConfigError(ValueError):
    """A key of kv_connector_extra_config is unknown or has a value that is not allowed, or an option of vLLM excludes
    the connector."""


_PULL, _LEASE = "D gives up the whole pull by then", "the lease has ended by then"
WITHIN: Final = (
    ("recv_deadline_s", "lease_limit_s", _LEASE),
    ("lease_s", "lease_limit_s", _LEASE),
    ("claim_s", "lease_limit_s", _LEASE),
    ("decoder_lease_s", "lease_limit_s", _LEASE),
    ("pull_timeout_s", "recv_deadline_s", _PULL),
    ("handshake_timeout_s", "recv_deadline_s", _PULL),
    ("link_timeout_s", "recv_deadline_s", _PULL),
    ("peer_backoff_s", "recv_deadline_s", _PULL),
)
"""Time limits within others, the outermost first, and why."""


class Parallel(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one side in recipes of vllm-ascend. What else they say of it is vllm-ascend's."""

    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    dp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None


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

    role_switch: bool = False
    """kv_both: `vllm-datadist role` changes while it serves whether it prefills for others, decodes, or does both."""

    recv_deadline_s: Seconds = 60.0
    """D gives a pull so long, from the scheduling of the request to its confirmation; no other limit outlasts it."""

    transfer_mode: Literal["pull", "push"] = "pull"
    """How D gets what P computes for a request that both got at once: it pulls, or offers P its blocks to write into. A
    request's own `transfer_mode` goes before."""

    handoff_wait_s: Seconds = 30.0
    """D gives a request that names a hand-off so long until P has heard of it, too; then it prefills it itself."""

    pull_timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 20.0
    """One PullKvBlocks call gives up after so long; the link is then made anew, and the pull, up to the deadline."""

    handshake_timeout_s: Seconds = 5.0
    """D waits so long for an answer on the side channel, then asks again if P may be busy, up to the deadline."""

    link_timeout_s: Seconds = 5.0
    """One LinkLlmClusters call gives up after so long; it is made again up to the pull's deadline."""

    peer_backoff_s: Seconds = 1.0
    """After a fault of a link D waits before it links again: shortly, then twice as long each time, at most this."""

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

    weights_id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """What to compare weights by, in place of samples of their files: any text, the same on both ends."""

    may_differ: Annotated[list[str], msgspec.Meta(max_length=256)] = []
    """D pulls from a P although these differ, at the cost of wrong answers if they matter: `weights`, `model`, and
    settings of the model as a refusal names them (`a` stands for all of `a.b`)."""

    provider: Literal["auto", "engine", "cann"] = "auto"
    """Implementation of the LLM-DataDist API: auto takes cann, the library of the CANN toolkit, where vLLM runs on
    NPUs, and elsewhere our engine."""

    local_comm_res: Annotated[str, msgspec.Meta(max_length=65536)] = ""
    """cann: this rank's place in the network as CANN's JSON, or the path of a file that holds it, in which `{device}`
    stands for the NPU's physical id. Empty: CANN finds it out from `host`, as it should."""

    ascend_local_comm_res_path: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """cann: as vllm-ascend's recipes have it, a folder with a file `ub_endpoint_npu_{device}.json` for each NPU."""

    prefill: Parallel | None = None
    """Of vllm-ascend's recipes, as is `decode`: how many ranks either side has. Not needed, each side asks the other;
    what is said of this side must be so."""

    decode: Parallel | None = None

    use_ascend_direct: bool = False
    """Of vllm-ascend's recipes for Mooncake; without effect."""

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
        if self.role_switch and self.bidirectional:
            raise ConfigError(
                "role_switch and bidirectional exclude each other: who keeps blocks for next turns gives and takes in"
                " either role"
            )
        if self.local_comm_res and self.ascend_local_comm_res_path:
            raise ConfigError("local_comm_res and ascend_local_comm_res_path exclude each other: they say the same")
        for entry in self.allowed_peers:
            try:
                ipaddress.ip_network(entry, strict=False)
            except ValueError:
                raise ConfigError(
                    f"allowed_peers: {entry!r} is neither an IP address nor a network such as '10.0.0.0/16'"
                ) from None
        for name in sorted({"kv_cache_dtype", "kv_packing"} & set(self.may_differ)):
            raise ConfigError(
                f"may_differ: {name!r} says how bytes of a KV cache are read; allowed: {', '.join(OVERRIDABLE)}, and"
                " settings of the model such as 'rope_parameters.rope_theta'"
            )
        self._check_times()

    def _check_times(self) -> None:
        """A limit that another one always cuts short would do nothing, and nobody would know."""
        for inner, outer, why in WITHIN:
            value, limit = getattr(self, inner), getattr(self, outer)
            # Nothing lasts decoder_lease_s where turns are not kept.
            if value > limit and (inner != "decoder_lease_s" or self.bidirectional):
                raise ConfigError(f"{inner}: {value} is above {outer} ({limit}): {why}; lower {inner} or raise {outer}")

    def allows_peer(self, host: str) -> bool:
        """Whether a host named by a router, client or peer may be dialled. Names are refused: only literals match."""
        return _allows(host, self.host, tuple(self.allowed_peers))


@functools.lru_cache(maxsize=1024)
def _allows(host: str, own_host: str, allowed_peers: tuple[str, ...]) -> bool:
    """Remembered: every request of a D asks, and nearly all name the same few peers."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if "%" in host:
        # A scope is text of the client's choosing, and would make one peer look like many.
        return False
    if address.is_loopback or address == ipaddress.ip_address(own_host):
        return True
    return any(address in network for network in _networks(allowed_peers))


@functools.lru_cache(maxsize=16)
def _networks(entries: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Parsed once: every request of a D asks."""
    return tuple(ipaddress.ip_network(entry, strict=False) for entry in entries)


def check_before_start(extra: Mapping[str, object] | None) -> ConnectorConfig:
    """What can be told without an engine: minutes later, with a model in memory, it would end the start all the same.

    Raises:
        ConfigError: as parse_config(); or the key file cannot be read, or the native library is not there.
    """
    config = parse_config(extra)
    if config.auth and not os.access(config.auth, os.R_OK):
        raise ConfigError(f"auth: {config.auth!r} cannot be read; `vllm-datadist key FILE` makes a key file")
    if importlib.util.find_spec(f"{__package__}._native") is None:
        raise ConfigError(
            f"{__package__} is installed without its native library, {__package__}/_native.*.so: install its wheel, or"
            " `pip install .` in its repository, which compiles it"
        )
    return config


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
    _follow_what_is_given(given)
    try:
        return msgspec.convert(given, ConnectorConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        field = re.split(r"[.\[]", str(error).rpartition("$.")[2].rstrip("`"))[0]
        if field not in given or f"$.{field}." in str(error):
            raise ConfigError(f"kv_connector_extra_config: {error}") from None
        raise ConfigError(
            f"kv_connector_extra_config: {field}: {given[field]!r:.200}, allowed: {_allowed(field)}"
        ) from None


def _follow_what_is_given(given: dict[str, object]) -> None:
    """Who sets one time limit need not know of the others: those within it that are not given are no longer than it."""
    defaults = {each.name: each.default for each in msgspec.structs.fields(ConnectorConfig)}
    for inner, outer, _ in WITHIN:
        limit, default = given.get(outer), defaults[inner]
        if inner not in given and isinstance(limit, int | float) and 0 < limit < default:
            given[inner] = limit


def with_time_limits(config: ConnectorConfig, given: Collection[str], defaults: Mapping[str, float]) -> ConnectorConfig:
    """`config` as if the time limits that are not `given` had these defaults; the limits around them stand."""
    around = {inner: getattr(config, outer) for inner, outer, _ in WITHIN}
    follow = {name: min(value, around[name]) for name, value in defaults.items() if name not in given}
    return msgspec.structs.replace(config, **follow)


def _allowed(field: str) -> str:
    """The values that a key may have, in words."""
    (kind,) = (each.type for each in msgspec.structs.fields(ConnectorConfig) if each.name == field)
    info = msgspec.inspect.type_info(kind)
    match info:
        case msgspec.inspect.LiteralType():
            return ", ".join(map(repr, info.values))
        case msgspec.inspect.BoolType():
            return "true, false"
        case msgspec.inspect.IntType():
            return f"whole numbers from {info.ge} to {info.le}"
        case msgspec.inspect.FloatType():
            least = f"from {info.ge} to" if info.gt is None else f"above {info.gt} up to"
            return f"numbers {least} {info.le}"
        case msgspec.inspect.ListType():
            return f"a list of at most {info.max_length} texts"
        case msgspec.inspect.UnionType():
            return "an object such as {'tp_size': 8, 'dp_size': 1}"
        case msgspec.inspect.StrType(max_length=most):
            return f"a text of at most {most} characters" if most is not None else "a text"
    raise TypeError(f"{field}: {info}")
