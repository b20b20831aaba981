"""`vllm-datadist doctor` on any machine: what is wrong is found, named, and told with what helps."""

from __future__ import annotations

import importlib.util
import json
import socket
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.machines import BuiltMachine
from support.pd import LOOPBACK, TOKEN

from vllm_datadist_connector.cli import main
from vllm_datadist_connector.doctor import installation, network, transports
from vllm_datadist_connector.doctor.command import Question, examine
from vllm_datadist_connector.doctor.deployment import (
    Deployment,
    Serve,
    check_serve,
    parse_serve,
    understand,
)
from vllm_datadist_connector.doctor.finding import Finding, Status, summary_of, text_of
from vllm_datadist_connector.doctor.machine import Machine
from vllm_datadist_connector.doctor.peer import check_peer
from vllm_datadist_connector.doctor.provider import Probed, check_provider, probe
from vllm_datadist_connector.protocol.version import PROTOCOL_VERSION
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust
from vllm_datadist_connector.side_channel.server import ChannelServer, LeaseTable, serve

GOOD = {"kv_connector": "DataDistConnector", "kv_role": "kv_both"}
OTHER_HOST = "192.0.2.1"
"""Of nobody's: RFC 5737."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "DATADIST_AUTH_KEY_FILE", "DATADIST_INSECURE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def built(tmp_path: Path) -> BuiltMachine:
    return BuiltMachine(tmp_path)


def deployed(serve: Serve | None = None, **extra: object) -> Deployment:
    found, finding = understand(json.dumps(GOOD | {"kv_connector_extra_config": extra}), serve or Serve())
    assert finding.status == "ok", finding
    return found


# ---- installation ----


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.23.0", "ok"),
        ("0.33.1+cpu", "ok"),
        ("0.32.0rc1", "ok"),
        ("0.22.1", "wrong"),
        ("0.34.0", "warning"),
        ("1.0.0", "warning"),
        ("dev", "warning"),
        (None, "warning"),
    ],
)
def test_versions_of_vllm(version: str | None, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version_of", lambda _: version)
    finding = installation.check_vllm()
    assert finding.status == status
    assert (version or "of no known version") in finding.found
    assert bool(finding.do) == (status != "ok")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(installation, "entry_points", lambda **_: ())
    findings = {each.name: each for each in examine(Machine(environ={}), Question(quick=True))}
    assert findings["vllm"].found.startswith("vllm is not installed in")
    assert "is no plugin of vLLM here" in findings["plugin"].found
    assert "without its native library" in findings["native library"].found
    assert all(findings[name].status == "wrong" for name in ("vllm", "plugin", "native library"))


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> types.ModuleType:
        raise ImportError(f"{name}: GLIBC_2.99 not found")

    monkeypatch.setattr(installation, "import_module", refuse)
    finding = installation.check_native()
    assert (finding.status, "GLIBC_2.99" in finding.found) == ("wrong", True)


def test_the_native_library_and_its_providers() -> None:
    finding = installation.check_native()
    assert (finding.status, "providers: engine" in finding.found) == ("ok", True)


def test_the_plugin_is_found() -> None:
    assert installation.check_plugin(Machine(environ={})) == Finding(
        "plugin", "ok", "vLLM finds datadist = vllm_datadist_connector.plugin:register"
    )


def test_a_plugin_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("datadist", "vllm_datadist_connector.plugin:nothing", "vllm.general_plugins")
    monkeypatch.setattr(installation, "entry_points", lambda **_: (broken,))
    finding = installation.check_plugin(Machine(environ={}))
    assert (finding.status, "AttributeError" in finding.found) == ("wrong", True)


@pytest.mark.parametrize("allowed", ["", "none", "datadist2,other", "other, datadist"])
def test_vllm_plugins_is_named(allowed: str) -> None:
    finding = installation.check_plugin(Machine(environ={"VLLM_PLUGINS": allowed}))
    assert finding.status == "wrong"
    assert f"VLLM_PLUGINS is {allowed!r}" in finding.found
    assert installation.check_plugin(Machine(environ={"VLLM_PLUGINS": "other,datadist"})).status == "ok"


# ---- what is to be started ----


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("", "--kv-transfer-config is empty"),
        ("{", "--kv-transfer-config: "),
        ("[]", "--kv-transfer-config: not a JSON object"),
        ("/no/such/file", "neither JSON nor a file"),
        (
            json.dumps(GOOD | {"kv_connector": "NixlConnector"}),
            "kv_connector: 'NixlConnector', not 'DataDistConnector'",
        ),
        (json.dumps(GOOD | {"kv_role": "both"}), "kv_role: 'both', allowed: kv_producer, kv_consumer, kv_both"),
        (
            json.dumps(GOOD | {"kv_connector_extra_config": {"lease": 5}}),
            "unknown key 'lease'; did you mean 'lease_s'?",
        ),
        (json.dumps(GOOD | {"kv_connector_extra_config": [1]}), ""),
        (json.dumps(GOOD | {"kv_connector_extra_config": {"host": "10.0.0.1"}}), "needs a key file"),
    ],
)
def test_a_wrong_configuration(config: str, told: str) -> None:
    _, finding = understand(config, Serve())
    assert finding.status == "wrong"
    assert told in finding.found
    assert finding.do


def test_configurations_that_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "prefill.json"
    file.write_text(json.dumps(GOOD | {"kv_role": "kv_producer"}))
    inner = [{"kv_connector": "OffloadingConnector"}, GOOD | {"kv_connector_extra_config": {"lease_s": 7.0}}]
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": inner},
    }
    nixl = {"kv_connector": "NixlConnector", "kv_connector_module_path": "vllm_datadist_connector.nixl"}
    assert understand(str(file), Serve())[0].role == "kv_producer"
    assert understand(json.dumps(multi), Serve())[0].config.lease_s == 7.0
    assert understand(json.dumps(nixl | {"kv_role": "kv_consumer"}), Serve())[0].role == "kv_consumer"
    assert understand(None, Serve(flags={"kv-transfer-config": json.dumps(GOOD)}))[0].role == "kv_both"
    assert understand(None, Serve())[1].status == "not_applicable"


def test_what_the_environment_says_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_INSECURE", "yes")
    _, finding = understand(None, Serve())
    assert (finding.status, "DATADIST_INSECURE" in finding.found) == ("wrong", True)


@pytest.mark.parametrize(
    ("command", "model", "flags"),
    [
        (["vllm", "serve", "m", "-tp", "4", "--enable-sleep-mode"], "m", {"tensor-parallel-size": "4"}),
        (["serve", "--model", "m", "-tp=4"], "m", {"tensor-parallel-size": "4"}),
        (["--enable_sleep_mode", "--kv_transfer_config={}", "--model=m"], "m", {"kv-transfer-config": "{}"}),
        (["vllm", "serve", "m", "--kv-transfer-config"], "m", {"kv-transfer-config": ""}),
        ([], "", {}),
    ],
)
def test_commands_of_vllm(command: list[str], model: str, flags: dict[str, str]) -> None:
    serve = parse_serve(command)
    assert serve.model == model
    assert flags.items() <= serve.flags.items()


def test_ranks_are_counted() -> None:
    assert parse_serve(["m", "-tp", "4", "-pp", "2", "-dp", "3"]).ranks == 24
    assert parse_serve(["m", "-tp", "x"]).ranks == 1


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--enable-sleep-mode", "unmaps the KV cache"),
        ("--decode-context-parallel-size=2", "--decode-context-parallel-size 2"),
        ("-pcp=2", "--prefill-context-parallel-size 2"),
        ("--enable-return-routed-experts", "experts"),
    ],
)
def test_options_that_exclude_the_connector(flag: str, told: str) -> None:
    (finding,) = check_serve(parse_serve(["m", flag]))
    assert (finding.status, told in finding.found) == ("wrong", True)


def test_other_options() -> None:
    assert [each.status for each in check_serve(parse_serve(["m", "--port", "1", "-dcp", "1"]))] == ["ok"]
    assert [each.status for each in check_serve(Serve())] == ["not_applicable"]
    assert [each.status for each in check_serve(parse_serve(["m", "--config", "f.yaml"]))] == ["warning"]


# ---- addresses, ports, keys ----


def test_host_addresses() -> None:
    at_peer = Endpoint("192.0.2.7", 1)
    assert network.check_host(deployed(), None).status == "ok"
    assert network.check_host(deployed(), Endpoint(LOOPBACK, 1)) == Finding(
        "host address", "ok", f"{LOOPBACK}: reached from this machine only"
    )
    unreachable = network.check_host(deployed(), at_peer)
    assert (unreachable.status, "192.0.2.7" in unreachable.found) == ("wrong", True)
    foreign = network.check_host(deployed(host=OTHER_HOST, insecure=True), at_peer)
    assert (foreign.status, "no address of this machine" in foreign.found) == ("wrong", True)


def test_key_files(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert "nobody else" in network.check_key(deployed()).found
    assert network.check_key(deployed(insecure=True)).status == "warning"
    assert "No such file" in network.check_key(deployed(auth=str(key))).found
    main(["key", str(key)])
    assert network.check_key(deployed(auth=str(key))).status == "ok"
    key.chmod(0o644)
    finding = network.check_key(deployed(auth=str(key)))
    assert (finding.status, "others may use it: mode 0644" in finding.found) == ("wrong", True)


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


def test_ports(busy: int, built: BuiltMachine) -> None:
    # Ports that the system gives away are those of this test: elsewhere none would be in use.
    built.write("proc/sys/net/ipv4/ip_local_port_range", "1\t2\n")
    machine = built.machine()
    assert network.check_ports(machine, deployed()).found == "chosen by the system: peers learn them"
    taken = network.check_ports(machine, deployed(engine_port=busy - 2, serve=parse_serve(["m", "-tp", "3"])))
    assert (taken.status, f"{LOOPBACK}:{busy}: Address already in use" in taken.found) == ("wrong", True)
    overlapping = parse_serve(["m", "-dp", "4"])
    both = network.check_ports(machine, deployed(overlapping, side_channel_port=busy - 9, engine_port=busy - 8))
    assert (both.status, "they overlap" in both.found) == ("wrong", True)
    above = network.check_ports(machine, deployed(parse_serve(["m", "-tp", "8"]), engine_port=65530))
    assert (above.status, "65535" in above.found) == ("wrong", True)


def test_ports_that_the_system_gives_away(built: BuiltMachine) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    config = deployed(side_channel_port=port)
    built.write("proc/sys/net/ipv4/ip_local_port_range", f"{port}\t{port}\n")
    assert network.check_ports(built.machine(), config).status == "warning"
    built.write("proc/sys/net/ipv4/ip_local_port_range", "1\t2\n")
    assert network.check_ports(built.machine(), config).status == "ok"
    built.write("proc/sys/net/ipv4/ip_local_port_range", "garbled")
    assert network.check_ports(built.machine(), config).status in ("ok", "warning")


# ---- a peer ----


@pytest.fixture
def instance() -> Iterator[ChannelServer]:
    server = serve(Endpoint(LOOPBACK, 0), "engine", TOKEN, LeaseTable(600.0), Trust())
    yield server
    server.close()


def test_a_peer_that_answers(instance: ChannelServer) -> None:
    (finding,) = check_peer(Endpoint(LOOPBACK, instance.port), deployed())
    assert finding.status == "ok"
    assert f"protocol version {PROTOCOL_VERSION}" in finding.found
    assert "proven by the kernel" in finding.found
    assert "selftest" in finding.do


def test_a_peer_of_another_version() -> None:
    server = ChannelServer(LOOPBACK, 0, "engine", TOKEN, PROTOCOL_VERSION + 1, LeaseTable(600.0))
    try:
        (finding,) = check_peer(Endpoint(LOOPBACK, server.port), deployed())
    finally:
        server.close()
    assert finding.status == "wrong"
    assert str(PROTOCOL_VERSION + 1) in finding.found


def test_a_peer_that_is_not_there(busy: int) -> None:
    with socket.create_server((LOOPBACK, 0)) as closed:
        gone = Endpoint(LOOPBACK, closed.getsockname()[1])
    (finding,) = check_peer(gone, deployed())
    assert (finding.status, "refused" in finding.found) == ("wrong", True)
    # Somebody listens, who is no instance, and over TCP nobody vouches for anybody.
    (finding,) = check_peer(Endpoint(LOOPBACK, busy), deployed())
    assert finding.status == "wrong"


def test_a_peer_that_d_would_not_dial(instance: ChannelServer) -> None:
    refused = check_peer(Endpoint("127.0.0.1", instance.port), deployed())
    assert [each.status for each in refused] == ["ok"]
    first, *_ = check_peer(Endpoint(OTHER_HOST, 1), deployed(auth="/no/key"))
    assert (first.status, "allowed_peers" in first.found) == ("wrong", True)
    producer, _ = understand(json.dumps(GOOD | {"kv_role": "kv_producer"}), Serve())
    assert not producer.pulls


# ---- the provider, and huge pages ----


def test_the_engine_tells_its_capabilities() -> None:
    probed = probe("engine", Machine().environ)
    assert (probed.error, probed.torch_npu) == ("", "")
    assert probed.capabilities["host_memory"] is True
    assert check_provider("engine", probed).status == "ok"


def test_a_provider_that_is_not_there() -> None:
    finding = check_provider("nobody's", probe("nobody's", Machine().environ))
    assert (finding.status, "nobody's" in finding.found) == ("wrong", True)


def test_a_library_that_ends_its_process() -> None:
    probed = probe("cann", {}, ("/bin/sh", "-c", "echo boom >&2; kill -SEGV $$"))
    assert "ended with status -11: boom" in probed.error
    assert check_provider("cann", probed) == Finding("provider", "wrong", f"cann: {probed.error}", "do what it says")
    assert Probed(error="x").capabilities == {}


def test_huge_pages(built: BuiltMachine) -> None:
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    assert transports.check_huge_pages(built.machine(), deployed()).status == "warning"
    built.write(path, "always [madvise] never\n")
    assert transports.check_huge_pages(built.machine(), deployed()).status == "ok"
    built.write(path, "always madvise [never]\n")
    finding = transports.check_huge_pages(built.machine(), deployed())
    assert (finding.status, "/sys/kernel/mm" in finding.do) == ("warning", True)
    assert transports.check_huge_pages(built.machine(), deployed(huge_pages=False)).status == "not_applicable"


# ---- the report ----


def test_a_check_that_fails_costs_its_own_findings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Finding:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(installation, "check_vllm", fail)
    findings = {each.name: each for each in examine(Machine(), Question(quick=True))}
    assert findings["vllm"].found == "could not be looked at: RuntimeError: a fault of ours"
    assert findings["plugin"].status == "ok"


def test_text() -> None:
    finding = Finding("ports", "wrong", "in use " * 30, "choose another")
    lines = list(text_of(finding))
    assert lines[0].startswith("wrong    ports: in use")
    assert lines[-1] == "         -> choose another"
    assert all(len(line) <= 120 for line in lines)
    assert summary_of([finding]) == "1 wrong, 0 to be looked at."
    assert summary_of([Finding("a", "ok", "b")]) == "Nothing is wrong."


def test_exit_status_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json", "--config", json.dumps(GOOD)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {each["name"]: each["status"] for each in report["findings"]}["configuration"] == "ok"
    assert set(report["findings"][0]) == {"name", "status", "found", "do"}
    assert main(["doctor", "--quick", "--", "vllm", "serve", "m", "--kv-transfer-config", ""]) == 1
    assert "--kv-transfer-config is empty" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--peer", "nobody"], ["--peer", "host:1"], ["--nothing"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
