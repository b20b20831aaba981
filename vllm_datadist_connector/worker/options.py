"""What a rank asks of its provider, from the configuration and from what the provider can do.

What a user asked for and the provider cannot do is refused, by the key's name: quietly left out, it would be believed.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Collection, Mapping
from typing import Final

import msgspec.structs

from vllm_datadist_connector import _native
from vllm_datadist_connector.config import ConfigError, ConnectorConfig, with_time_limits
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.protocol.handshake import MAX_BYTES
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.comm_res import find_comm_res

logger = logging.getLogger(__name__)

LISTEN: Final = "llm.ListenIpInfo"

_ENGINES_OWN: Final = ("transport", "transfer_threads", "tcp_streams", "verify")
"""Keys that are options of our engine."""
_LINK_S: Final = 60.0
"""Of a link over hardware: queue pairs and registrations of all memory are exchanged."""


def choose_provider(wanted: str, is_npu: bool) -> str:
    if wanted != "auto":
        return wanted
    return "cann" if is_npu else "engine"


def adapt_config(
    config: ConnectorConfig,
    given: Collection[str],
    capabilities: _native.Capabilities,
    environ: Mapping[str, str] = os.environ,
    is_both: bool = False,
) -> ConnectorConfig:
    """The configuration with the time limits that suit the provider where none are `given`.

    Args:
        is_both: the instance is P and D.

    Raises:
        ConfigError: names the key that the provider cannot follow.
    """
    if is_both and not capabilities.crossing_links:
        raise ConfigError(
            "kv_role: kv_both, and bidirectional, need a provider with which two instances may link with each other at"
            " once; this one would hang; use kv_producer and kv_consumer"
        )
    _refuse_what_it_cannot(config, capabilities)
    if not capabilities.writes_end_with_call:
        # Hardware carries on for its own time: a call that gave up before would cost a link for each hiccup.
        defaults = {"link_timeout_s": _LINK_S, "pull_timeout_s": hardware_timeout_s(environ)}
        config = with_time_limits(config, given, defaults)
    least = capabilities.min_link_timeout_ms / 1000
    if config.link_timeout_s < least:
        raise ConfigError(
            f"link_timeout_s: {config.link_timeout_s}, no other limit outlasts recv_deadline_s"
            f" ({config.recv_deadline_s}); allowed with this provider: at least {least:g}"
        )
    return config


def _refuse_what_it_cannot(config: ConnectorConfig, capabilities: _native.Capabilities) -> None:
    address = ipaddress.ip_address(config.host)
    if address.version == 6 and not capabilities.ipv6:
        raise ConfigError(f"host: {config.host!r} is an IPv6 address; this provider links over IPv4 only")
    if not capabilities.reports_port and not config.engine_port:
        raise ConfigError("engine_port: this provider does not tell which port it has been given; name one")
    if config.role_switch and not capabilities.reports_links:
        raise ConfigError(
            "role_switch: a role changes when there are no links, and this provider does not tell which there are;"
            " leave it out"
        )
    if capabilities.engine_options:
        for name in ("local_comm_res", "ascend_local_comm_res_path"):
            if getattr(config, name):
                raise ConfigError(f"{name}: our engine has no use for it; it takes 'provider': 'cann'")
        return
    if address.is_loopback:
        logger.warning(
            "host %s: this server is known to peers by that address, and those of other hosts cannot link; name an"
            " IPv4 address that they can reach",
            config.host,
        )
    defaults = {each.name: each.default for each in msgspec.structs.fields(ConnectorConfig)}
    for name in _ENGINES_OWN:
        if (value := getattr(config, name)) != defaults[name]:
            raise ConfigError(
                f"{name}: {value!r} is an option of our engine, and not this provider's; allowed: {defaults[name]!r}"
            )
    if config.auth:
        logger.warning("auth: the key guards leases and greetings; this provider's own links ask nobody for one")


def hardware_timeout_s(environ: Mapping[str, str] = os.environ) -> float:
    """How long HCCL goes on with one transfer, as vllm-ascend counts it: all its retries, and three seconds.

    Raises:
        ConfigError: an environment variable is not a number that HCCL takes.
    """
    given = _number(environ, "ASCEND_TRANSFER_TIMEOUT", 0, 1, 3_600_000)
    exponent = _number(environ, "HCCL_RDMA_TIMEOUT", 20, 5, 24)
    retries = _number(environ, "HCCL_RDMA_RETRY_CNT", 7, 1, 7)
    milliseconds = given or int(4.096 * 2**exponent * retries // 1000 + 3000)
    return max(0.1, milliseconds / 1000)


def _number(environ: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"environment variable {name}: {text!r}, allowed: whole numbers from {least} to {most}")
    return int(text)


def make_options(
    config: ConnectorConfig,
    capabilities: _native.Capabilities,
    duties: Duties,
    index: int,
    device: int,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Of Initialize.

    Args:
        index: of this rank among those of its instance: offset of its port.
        device: as this process counts them.

    Raises:
        ConfigError: what the user says of the NPU's place in the network is wrong.
    """
    options = {
        "llm.DeviceId": str(device),
        "llm.SyncKvCacheWaitTime": str(int(config.pull_timeout_s * 1000)),
    }
    listens = duties.gives or capabilities.both_listen
    if capabilities.engine_options:
        options |= _engine_options(config, duties)
    else:
        place = find_comm_res(config, device, environ)
        options |= {"llm.LocalCommRes": place.text} if place.text else {}
        if place.backend:
            options["llm.TransferBackend"] = place.backend
            listens = True
    if listens:
        port = config.engine_port + index if config.engine_port else 0
        options[LISTEN] = str(Endpoint(config.host, port))
    return options


def _engine_options(config: ConnectorConfig, duties: Duties) -> dict[str, str]:
    writes = {"read": "read_granted", "none": "granted"} if duties.takes else {}
    access = "read" if duties.gives else "none"
    return {
        "datadist.Transport": config.transport,
        "datadist.TransferThreads": str(config.transfer_threads),
        "datadist.TcpStreams": str(config.tcp_streams),
        "datadist.HugePages": str(int(config.huge_pages)),
        # Nobody reads a D's KV cache, and nobody writes into anybody's but for blocks that a D has offered.
        "datadist.PeerAccess": writes.get(access, access),
        "datadist.Verify": config.verify,
        # Said in any case: what the environment says was taken into the configuration.
        "datadist.AuthKeyFile": config.auth,
        "datadist.Insecure": str(int(config.insecure)),
        # vLLM sized its KV cache already, and each view of it counts anew: the documented limit would only refuse.
        "datadist.MaxDeviceBytes": str(MAX_BYTES),
    }
