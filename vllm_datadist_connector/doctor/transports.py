"""Which transports work on this host: a link by each of them between two processes, and a pull over it."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_datadist_connector.doctor.deployment import Deployment
from vllm_datadist_connector.doctor.finding import Finding, Status
from vllm_datadist_connector.doctor.machine import Machine

_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_PTRACE_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"
_SIZE, _BLOCK = 32 << 20, 256 << 10


def check_transports(machine: Machine, deployment: Deployment) -> list[Finding]:
    forced = deployment.config.transport
    findings = [Finding("transport local", "ok", "always there, within one process")]
    for name in ("cma", "tcp"):
        problem, rate = _try(name, deployment)
        if not problem:
            findings.append(Finding(f"transport {name}", "ok", f"a pull of {_SIZE >> 20} MiB: {rate / 1e9:.2f} GB/s"))
        else:
            status: Status = "wrong" if name in (forced, "tcp") else "warning"
            do = _cure_of_cma(machine) if name == "cma" else "see why; between hosts there is no other transport"
            findings.append(Finding(f"transport {name}", status, problem, do))
    return findings


def check_huge_pages(machine: Machine, deployment: Deployment) -> Finding:
    name, text = "huge pages", machine.read(_HUGE_PAGES) or ""
    if not deployment.config.huge_pages:
        return Finding(name, "not_applicable", "switched off by `huge_pages`")
    if "[never]" in text or not text:
        do = f"as root: echo madvise > {_HUGE_PAGES}"
        return Finding(name, "warning", "the machine has none: cma is two to three times slower", do)
    return Finding(name, "ok", text.strip())


def _cure_of_cma(machine: Machine) -> str:
    """Instances on one host then use tcp, which needs a key even there."""
    scope = (machine.read(_PTRACE_SCOPE) or "").strip()
    if scope in ("2", "3"):
        return f"{_PTRACE_SCOPE} is {scope}: as root set it to 1 or 0 (3 lasts until the next start of the machine)"
    if "Seccomp:\t2" in (machine.read("/proc/self/status") or ""):
        return (
            "a seccomp filter is on, as containers have: start them with --cap-add SYS_PTRACE, and P and D in one pid"
            " namespace; else instances on one host use tcp"
        )
    return "P and D must be of one user and in one pid namespace; else instances on one host use tcp"


def _try(transport: str, deployment: Deployment) -> tuple[str, float]:
    """Why it does not work, or bytes a second."""
    from vllm_datadist_connector.selftest.bench import Bench, Place, Settings, WrongError, must
    from vllm_datadist_connector.selftest.party import HOST
    from vllm_datadist_connector.selftest.remote import PartyError, PartyLostError, ProcessWire

    place = Place(deployment.config.host, HOST, ProcessWire)
    with _key_of(deployment) as key:
        options = {
            "datadist.Transport": transport,
            "datadist.AuthKeyFile": key,
            "datadist.Insecure": str(int(deployment.config.insecure)),
            "datadist.TransferThreads": str(deployment.config.transfer_threads),
            "datadist.TcpStreams": str(deployment.config.tcp_streams),
        }
        settings = Settings(provider="engine", pull_timeout_ms=20_000, engine_options=options)
        try:
            with Bench(place, place, settings).pair() as (a, b):
                for seed, end in enumerate((a, b)):
                    end.allocate("kv", _SIZE, seed)
                ours, theirs = (end.register("kv", _BLOCK, _SIZE // _BLOCK) for end in (a, b))
                must(a.link(b), "LinkLlmClusters")
                blocks = list(range(_SIZE // _BLOCK))
                times = [must(a.pull(b, theirs, ours, blocks, blocks), "PullKvBlocks").seconds for _ in range(3)]
                wrong = a.wrong_bytes("kv", 0, 1, [(0, 0, _SIZE)])
        except (WrongError, PartyError, PartyLostError) as error:
            return str(error), 0.0
    return (f"{wrong} bytes of a pull are wrong", 0.0) if wrong else ("", _SIZE / max(min(times), 1e-9))


@contextlib.contextmanager
def _key_of(deployment: Deployment) -> Iterator[str]:
    """The key of the configuration, or one for this test alone: over TCP even this host's processes need one."""
    if deployment.config.auth or deployment.config.insecure:
        yield deployment.config.auth
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key"
        path.touch(0o600)
        path.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
        yield str(path)
