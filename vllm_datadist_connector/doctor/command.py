"""The command line of `vllm-datadist doctor`, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import vllm_datadist_connector
from vllm_datadist_connector.arguments import endpoint
from vllm_datadist_connector.doctor import installation, network
from vllm_datadist_connector.doctor.ascend.checks import check_ascend, is_ascend
from vllm_datadist_connector.doctor.deployment import Deployment, Serve, check_serve, parse_serve, understand
from vllm_datadist_connector.doctor.finding import Finding, summary_of, text_of
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.doctor.peer import check_peer
from vllm_datadist_connector.doctor.provider import adapt, check_provider, probe
from vllm_datadist_connector.doctor.transports import check_huge_pages, check_transports
from vllm_datadist_connector.side_channel.endpoint import Endpoint

ENGINE = "engine"


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What the doctor is asked about."""

    config: str | None = None
    peer: Endpoint | None = None
    model: str = ""
    serve: Serve = dataclasses.field(default_factory=Serve)
    quick: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE|JSON", help="vLLM's --kv-transfer-config")
    parser.add_argument("--peer", type=endpoint, metavar="HOST:PORT", help="side channel of a running instance")
    parser.add_argument("--model", default="", metavar="DIR", help="folder of the model, whose config.json is read")
    parser.add_argument("--quick", action="store_true", help="only what takes no time: no links, no library is loaded")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "serve", nargs=argparse.REMAINDER, metavar="-- vllm serve ...", help="the command to be started"
    )


def run(options: argparse.Namespace) -> int:
    serve = parse_serve(options.serve[1:] if options.serve[:1] == ["--"] else options.serve)
    # A name of a model's instead of a folder may be on no disk yet.
    model = options.model or (serve.model if Path(serve.model).is_dir() else "")
    question = Question(options.config, options.peer, model, serve, options.quick)
    findings = []
    for finding in examine(Machine(), question):
        findings.append(finding)
        if not options.json:
            print("\n".join(text_of(finding)), flush=True)
    if options.json:
        report = {
            "doctor": vllm_datadist_connector.__version__,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=1))
    else:
        print(summary_of(findings))
    return int(any(finding.status == "wrong" for finding in findings))


def examine(machine: Machine, question: Question) -> Iterator[Finding]:
    """Everything, as it is found."""
    deployment, configuration = understand(question.config, question.serve)
    yield from _safely("vllm", lambda: [installation.check_vllm()])
    yield from _safely("plugin", lambda: [installation.check_plugin(machine)])
    native = list(_safely("native library", lambda: [installation.check_native()]))
    yield from native
    yield configuration
    yield from _safely("options of vllm serve", lambda: check_serve(question.serve))
    yield from _safely("host address", lambda: [network.check_host(deployment, question.peer)])
    yield from _safely("ports", lambda: [network.check_ports(machine, deployment)])
    if any(each.status == "wrong" for each in native):
        return  # all that follows is done by it
    yield from _safely("trust", lambda: [network.check_key(deployment)])
    if not question.quick:
        yield from _check_moving(machine, deployment, question.model)
    if question.peer is not None:
        peer = question.peer
        yield from _safely(f"peer {peer}", lambda: check_peer(peer, deployment))


def _check_moving(machine: Machine, deployment: Deployment, model: str) -> Iterator[Finding]:
    """Whatever moves KV: the engine's transports, or CANN."""
    ascend = is_ascend(machine)
    provider: str = deployment.config.provider
    if provider == "auto" or not deployment.is_given:
        provider = "cann" if ascend else ENGINE
    probed = probe(provider, machine.environ)
    yield check_provider(provider, probed)
    deployment, findings = adapt(deployment, probed, machine.environ)
    yield from findings
    if provider == ENGINE:
        yield from _safely("transports", lambda: check_transports(machine, deployment))
        yield from _safely("huge pages", lambda: [check_huge_pages(machine, deployment)])
        why = "the provider is the engine" if ascend else "no NPU (/dev/davinciN), no CANN, no torch-npu"
        yield Finding("Ascend", "not_applicable", why)
    else:
        yield from _safely("Ascend", lambda: check_ascend(machine, deployment, model, probed))


def _safely(name: str, check: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    """A check that fails costs its own findings only."""
    try:
        return list(check())
    except Exception as error:
        found = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding(name, "warning", found, "report this: it is a fault of the doctor's")]
