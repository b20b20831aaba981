"""All checks of an Ascend machine, in the order in which they are shown."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
from pathlib import Path

from vllm_datadist_connector.config import ConfigError
from vllm_datadist_connector.doctor.ascend import cards as npus
from vllm_datadist_connector.doctor.ascend.library import check_library, check_versions, toolkits
from vllm_datadist_connector.doctor.ascend.model import MOST_REGIONS, check_regions
from vllm_datadist_connector.doctor.deployment import Deployment
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.installation import version_of
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.doctor.provider import Probed

_RDMA_TIMEOUTS = range(5, 25)
"""That HCCL takes."""
_PLUGINS = ("ascend", "ascend_kv_connector")


def is_ascend(machine: Machine) -> bool:
    return bool(
        npus.davinci(machine)
        or machine.environ.get("ASCEND_HOME_PATH")
        or any(machine.path(folder).exists() for folder in toolkits(machine))
        or version_of("torch-npu")
    )


def check_ascend(machine: Machine, deployment: Deployment, model: str, probed: Probed) -> list[Finding]:
    found = npus.find_cards(machine, deployment)
    most = int(probed.capabilities.get("max_regions", 0)) or MOST_REGIONS
    findings = [
        check_library(machine, probed),
        *check_versions(machine, probed),
        *_check_plugins(machine),
        *found.findings,
    ]
    if found.physical:
        findings += [*npus.check_addresses(machine, found), *npus.check_links(machine, found)]
    findings += [
        _check_host(deployment),
        _check_place(machine, deployment, len(found.physical)),
        _check_times(machine, deployment),
        *_check_packing(deployment),
        _check_allocator(machine),
        check_fence(),
    ]
    if model:
        findings.append(check_regions(model, deployment.serve.count("pipeline-parallel-size"), most))
    else:
        findings.append(Finding("memory regions", "not_applicable", "no model given", "give --model DIR"))
    return findings


def _check_plugins(machine: Machine) -> list[Finding]:
    allowed = machine.environ.get("VLLM_PLUGINS")
    absent = [name for name in _PLUGINS if allowed is not None and name not in allowed.split(",")]
    if not absent:
        return []
    do = f"add {','.join(absent)}: the variable is a list of all that vLLM may load, the platform's plugin included"
    return [Finding("plugins of vllm-ascend", "wrong", f"VLLM_PLUGINS is {allowed!r}", do)]


def _check_host(deployment: Deployment) -> Finding:
    name, host = "host address for CANN", deployment.config.host
    address = ipaddress.ip_address(host)
    if address.version != 4:
        return Finding(name, "wrong", f"{host}: the library links IPv4 addresses only", "set `host` to an IPv4 address")
    if address.is_loopback:
        found = f"{host} becomes the server's id, the same on every host"
        return Finding(name, "warning", found, "set `host` to this machine's own address, also for P and D on one host")
    return Finding(name, "ok", host)


def _check_place(machine: Machine, deployment: Deployment, cards: int) -> Finding:
    """What the user says of the NPUs' places in the network, as a worker checks it."""
    from vllm_datadist_connector.worker.comm_res import find_comm_res

    name = "local_comm_res"
    try:
        places = [find_comm_res(deployment.config, card, machine.environ) for card in range(cards)]
    except ConfigError as error:
        return Finding(name, "wrong", str(error), "correct it, or leave it out: CANN finds it out by itself")
    if not any(place.text for place in places):
        return Finding(name, "ok", "left to CANN, which finds it out from `host`")
    backends = sorted({place.backend or "default" for place in places})
    return Finding(name, "ok", f"given for {cards} cards, backend {', '.join(backends)}")


def _check_times(machine: Machine, deployment: Deployment) -> Finding:
    """A pull that gives up before the hardware does leaves it writing."""
    from vllm_datadist_connector.worker.options import hardware_timeout_s

    def hardware_s(**variables: str) -> float:
        environ = {key: value for key, value in machine.environ.items() if key != "ASCEND_TRANSFER_TIMEOUT"}
        return hardware_timeout_s({**environ, **variables})

    name, pull_s = "time-outs", deployment.config.pull_timeout_s
    try:
        hardware = hardware_s()
        fitting = [n for n in _RDMA_TIMEOUTS if hardware_s(HCCL_RDMA_TIMEOUT=str(n)) <= pull_s]
    except ConfigError as error:
        return Finding(name, "wrong", str(error), "correct or unset it")
    shown = f"a pull gives up after {pull_s:g} s, the hardware after {hardware:.1f} s"
    if pull_s >= hardware:
        return Finding(name, "ok", shown)
    lower = f", or HCCL_RDMA_TIMEOUT={max(fitting)} on both ends" if fitting else ""
    do = f"leave out pull_timeout_s and ASCEND_TRANSFER_TIMEOUT and raise what is above them{lower}"
    return Finding(name, "warning", f"{shown}: blocks of a failed pull wait for its link to be ended by force", do)


def _check_packing(deployment: Deployment) -> list[Finding]:
    name, text = "enable_kv_nz", deployment.serve.flags.get("additional-config")
    if text is None:
        return []
    try:
        given = json.loads(text)
        nz = isinstance(given, dict) and bool(given.get("enable_kv_nz"))
    except ValueError as error:
        return [Finding(name, "wrong", f"--additional-config: {error}", "correct it")]
    if nz:
        found = "on: the KV cache has another order of bytes in the same shape"
        return [
            Finding(name, "warning", found, "switch it on or off on P and D alike: they refuse each other otherwise")
        ]
    return [Finding(name, "ok", "off")]


def _check_allocator(machine: Machine) -> Finding:
    name, text = "allocator", machine.environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    if "expandable_segments:True" in text.replace(" ", ""):
        found = "expandable segments are on, as vllm-ascend sets them: registering such memory was not seen on hardware"
        return Finding(name, "warning", found, "run `vllm-datadist selftest --provider cann` with it and without")
    return Finding(name, "ok", text or "defaults")


def check_fence() -> Finding:
    """Where vLLM keeps freed blocks until the step that writes them has ended, by its source: it is not imported."""
    name = "blocks of running steps"
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return Finding(name, "not_applicable", "no vllm")
    try:
        source = (Path(spec.origin).parent / "v1/core/sched/scheduler.py").read_text(encoding="utf-8")
    except OSError as error:
        return Finding(name, "warning", f"vLLM's scheduler cannot be read: {error}")
    if "defer_block_free" in source:
        return Finding(name, "ok", "this vLLM gives blocks back when the step that writes them has ended")
    found = "this vLLM gives blocks back while a step may still write them: fence active, pulls wait for the device"
    return Finding(name, "ok", found)
