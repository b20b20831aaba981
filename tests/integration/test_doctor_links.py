"""`vllm-datadist doctor` where it tries things out: transports of this host, and a key between its ends."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
from support.machines import BuiltMachine
from support.pd import LOOPBACK, TOKEN

from vllm_datadist_connector.cli import main
from vllm_datadist_connector.doctor.command import Question, examine
from vllm_datadist_connector.doctor.deployment import Deployment, Serve, understand
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.doctor.peer import check_peer
from vllm_datadist_connector.doctor.transports import check_transports
from vllm_datadist_connector.selftest import remote
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import LeaseTable, serve

FAULTY = Path(__file__).parents[1] / "support" / "faulty_party.py"


def deployed(**extra: object) -> Deployment:
    config = {"kv_connector": "DataDistConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return understand(json.dumps(config), Serve())[0]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    main(["key", str(path)])
    return str(path)


def test_transports_of_this_host(key: str) -> None:
    for config in (deployed(), deployed(auth=key), deployed(insecure=True)):
        findings = by_name(check_transports(Machine(), config))
        assert {name: each.status for name, each in findings.items()} == dict.fromkeys(
            ("transport local", "transport cma", "transport tcp"), "ok"
        )
        assert "GB/s" in findings["transport cma"].found


@pytest.fixture
def no_process_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    command = (sys.executable, str(FAULTY), "WithoutProcessMemory")
    monkeypatch.setattr(remote, "ProcessWire", partial(remote.ProcessWire, command))


@pytest.mark.usefixtures("no_process_memory")
@pytest.mark.parametrize(("transport", "status"), [("auto", "warning"), ("tcp", "warning"), ("cma", "wrong")])
def test_a_host_where_processes_may_not_read_each_other(transport: str, status: str, tmp_path: Path) -> None:
    built = BuiltMachine(tmp_path)
    built.write("proc/self/status", "Name:\tpython\nSeccomp:\t2\n")
    findings = by_name(check_transports(built.machine(), deployed(transport=transport)))
    finding = findings["transport cma"]
    assert finding.status == status
    assert "the kernel refuses access to the memory of process" in finding.found
    assert "--cap-add SYS_PTRACE" in finding.do
    assert findings["transport tcp"].status == "ok"


@pytest.mark.usefixtures("no_process_memory")
def test_ptrace_scope_is_named(tmp_path: Path) -> None:
    built = BuiltMachine(tmp_path)
    built.write("proc/sys/kernel/yama/ptrace_scope", "2\n")
    finding = by_name(check_transports(built.machine(), deployed()))["transport cma"]
    assert "/proc/sys/kernel/yama/ptrace_scope is 2" in finding.do


def test_a_key_that_is_wrong_is_told_once() -> None:
    config = json.dumps(
        {
            "kv_connector": "DataDistConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"auth": "/no/such/key"},
        }
    )
    findings = by_name(list(examine(Machine(), Question(config=config))))
    assert findings["trust"].status == "wrong"
    assert "No such file" in findings["trust"].found


def test_the_peer_proves_itself(key: str, tmp_path: Path) -> None:
    other = tmp_path / "another"
    main(["key", str(other)])
    server = serve(Endpoint(LOOPBACK, 0), "engine", TOKEN, LeaseTable(600.0), Trust(auth=key))
    try:
        at = Endpoint(LOOPBACK, server.port)
        (finding,) = check_peer(at, deployed(auth=key))
        # On one host the kernel vouches for its processes, whatever keys they have.
        (without,) = check_peer(at, deployed(auth=str(other)))
    finally:
        server.close()
    assert (finding.status, "by a key or, within this host, by the kernel" in finding.found) == ("ok", True)
    assert without.status == "ok"


def test_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Nothing is wrong")
