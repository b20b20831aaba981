"""Addresses, ports and keys: whom this instance lets in, and whether others will find it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from vllm_datadist_connector.doctor.deployment import Deployment
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.side_channel.endpoint import Endpoint

_EPHEMERAL = "/proc/sys/net/ipv4/ip_local_port_range"


def check_host(deployment: Deployment, peer: Endpoint | None) -> Finding:
    name, host = "host address", deployment.config.host
    problem = _bind(host, 0)
    if problem:
        return Finding(name, "wrong", f"{host}: {problem}", "set `host` to an address of this machine")
    here = ipaddress.ip_address(host)
    if peer is not None and here.is_loopback and not ipaddress.ip_address(peer.host).is_loopback:
        found = f"{host} is reached by nobody else, and the peer is on {peer.host}"
        return Finding(name, "wrong", found, "set `host` to the address by which the peer reaches this machine")
    if here.is_loopback:
        do = "" if peer else "for instances on several machines set `host` to the address of this one"
        return Finding(name, "ok", f"{host}: reached from this machine only", do)
    return Finding(name, "ok", host)


def check_key(deployment: Deployment) -> Finding:
    """As the engine does it: owner, mode and content."""
    name = "trust"
    if deployment.config.insecure:
        found = f"insecure: whoever can connect to {deployment.config.host} is a peer, and may read KV caches"
        return Finding(name, "warning", found, "use `auth` unless the network is the deployment's own")
    if not deployment.config.auth:
        return Finding(name, "ok", "no key: peers are processes of this user on this host, and nobody else")
    from vllm_datadist_connector.side_channel.client import open_client

    try:
        open_client(deployment.trust).close()
    except ValueError as error:
        return Finding(
            name, "wrong", str(error), "`vllm-datadist key FILE` makes one; chmod 600 it, owned by this user"
        )
    return Finding(name, "ok", f"key file {deployment.config.auth}: the other end needs one of its keys")


def check_ports(machine: Machine, deployment: Deployment) -> Finding:
    name, config = "ports", deployment.config
    cores = deployment.serve.count("data-parallel-size")
    ranges = {
        "side_channel_port": range(config.side_channel_port, config.side_channel_port + cores),
        "engine_port": range(config.engine_port, config.engine_port + deployment.serve.ranks),
    }
    given = {key: ports for key, ports in ranges.items() if ports.start}
    if not given:
        return Finding(name, "ok", "chosen by the system: peers learn them")
    shown = ", ".join(f"{key} {ports.start} to {ports.stop - 1}" for key, ports in given.items())
    if any(ports.stop > 65536 for ports in given.values()):
        return Finding(name, "wrong", f"{shown}: there is no port above 65535", "begin lower")
    if len(given) == 2 and set(ranges["side_channel_port"]) & set(ranges["engine_port"]):
        return Finding(
            name, "wrong", f"{shown}: they overlap", "leave room: one side channel port per data parallel rank"
        )
    for key, ports in given.items():
        for port in ports:
            if problem := _bind(config.host, port):
                do = "choose another, or end what listens there; a running instance of this configuration is no fault"
                return Finding(name, "wrong", f"{key}: {Endpoint(config.host, port)}: {problem}", do)
    low, high = _ephemeral(machine)
    if any(ports.start <= high and ports.stop > low for ports in given.values()):
        found = f"{shown}; the system gives {low} to {high} to outgoing connections"
        return Finding(
            name, "warning", found, f"choose ports outside, or reserve them by {_EPHEMERAL[:-10]}reserved_ports"
        )
    return Finding(name, "ok", f"{shown}: free")


def _bind(host: str, port: int) -> str:
    """Why it is not possible to listen there; empty if it is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return "no address of this machine"
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def _ephemeral(machine: Machine) -> tuple[int, int]:
    words = (machine.read(_EPHEMERAL) or "").split()
    if len(words) == 2 and all(word.isdecimal() for word in words):
        return int(words[0]), int(words[1])
    return 32768, 60999
