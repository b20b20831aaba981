"""What the doctor says of Ascend machines, on machines built of files."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from support.machines import FIXTURES, BuiltMachine, ascend
from support.providers import HARDWARE

import vllm_datadist_connector
from vllm_datadist_connector.doctor.ascend import cards, checks, library
from vllm_datadist_connector.doctor.ascend.model import check_regions, regions_of
from vllm_datadist_connector.doctor.command import Question, examine
from vllm_datadist_connector.doctor.deployment import Deployment, Serve, parse_serve, understand
from vllm_datadist_connector.doctor.finding import Finding
from vllm_datadist_connector.doctor.provider import Probed, adapt

LIBRARY = "usr/local/Ascend/cann/lib64/libllm_datadist.so"


def config(role: str = "kv_producer", **extra: object) -> str:
    return json.dumps({"kv_connector": "DataDistConnector", "kv_role": role, "kv_connector_extra_config": extra})


def text(fixture: str) -> str:
    return (FIXTURES / fixture).read_text(encoding="utf-8")


# ---- models ----


@pytest.mark.parametrize(
    ("config", "regions"),
    [
        ({"num_hidden_layers": 64}, 128),
        ({"num_hidden_layers": 126}, 252),
        ({"text_config": {"num_hidden_layers": 64}}, 128),
        ({"num_hidden_layers": 62, "kv_lora_rank": 512}, 124),
        ({"num_hidden_layers": 62, "kv_lora_rank": 512, "index_topk": 2048}, 186),
        ({"num_hidden_layers": 48, "full_attention_interval": 4}, 36),
        ({"num_hidden_layers": 48, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12}, 36),
        ({"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}, 8),
    ],
)
def test_regions(config: dict[str, object], regions: int) -> None:
    """As measured with vllm-ascend's own allocation code."""
    assert regions_of(config).regions == regions


def test_a_model_with_too_many_regions(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"num_hidden_layers": 130}))
    assert check_regions(str(tmp_path), 1).status == "wrong"
    assert check_regions(str(tmp_path), 2).status == "ok"
    assert check_regions(str(tmp_path), 1, most=512).status == "ok"
    file.write_text(json.dumps({"num_hidden_layers": 126}))
    assert check_regions(str(tmp_path), 1).status == "warning"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"num_hidden_layers": "many"}'])
def test_a_model_that_cannot_be_read(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert check_regions(str(tmp_path), 1).status == "warning"


# ---- cards ----


def deployment(*command: str, config: str | None = None) -> Deployment:
    return understand(config, parse_serve(["m", *command]) if command else Serve())[0]


def found(built: BuiltMachine, *command: str) -> tuple[cards.Cards, Finding]:
    answer = cards.find_cards(built.machine(), deployment(*command))
    return answer, answer.findings[-1]


def test_logical_ids_are_told_as_physical_ones(tmp_path: Path) -> None:
    built = ascend(tmp_path, (4, 5))
    built.answers("npu-smi", {"'info -m'": "npu_smi_map_a2.txt"})
    answer, finding = found(built)
    assert answer.physical == [4, 5]
    assert finding == Finding("NPUs", "ok", "logical ids are physical ones: 0 is 4, 1 is 5")
    built.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1"
    assert found(built)[0].physical == [5]
    built.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1,7"
    assert found(built)[1].status == "wrong"
    assert "[7]" in found(built)[1].found
    built.environ["ASCEND_RT_VISIBLE_DEVICES"] = "first"
    assert found(built)[1].status == "wrong"


def test_without_npu_smi_the_device_files_tell(tmp_path: Path) -> None:
    built = ascend(tmp_path, (2, 10))
    built.program("npu-smi", "exit 1")
    answer, finding = found(built)
    assert answer.physical == [2, 10]
    assert [each.status for each in answer.findings] == ["warning", "ok"]
    assert finding.name == "NPUs"


def test_cards_that_are_not_there(tmp_path: Path) -> None:
    built = ascend(tmp_path, ())
    assert found(built)[1].status == "wrong"


def test_a_garbled_table_is_a_finding(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.answers("npu-smi", {"'info -m'": "npu_smi_map_garbled.txt"})
    finding = found(built)[1]
    assert (finding.status, "not understood" in finding.found) == ("wrong", True)


def test_more_ranks_than_cards(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.answers("npu-smi", {"'info -m'": "npu_smi_map_a3.txt"})
    assert found(built, "-tp", "4")[1].status == "ok"
    finding = found(built, "-tp", "8")[1]
    assert (finding.status, "8 worker ranks, 4 cards" in finding.found) == ("wrong", True)


def addresses(built: BuiltMachine, *physical: int) -> Finding:
    (finding,) = cards.check_addresses(built.machine(), cards.Cards(list(physical or (0, 1))))
    return finding


def test_device_addresses(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    assert addresses(built).status == "ok"
    assert "card 1 192.168.101.101" in addresses(built).found
    (tmp_path / "etc/hccn.conf").unlink()
    assert "by hccn_tool" in addresses(built, 0).found
    # The tool of this machine says the same of every card.
    assert (addresses(built).status, "several cards" in addresses(built).found) == ("wrong", True)


def test_nothing_tells_the_addresses(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    (tmp_path / "bin/hccn_tool").unlink()
    assert addresses(built).status == "ok"
    (tmp_path / "etc/hccn.conf").unlink()
    finding = addresses(built)
    assert (finding.status, "/etc/hccn.conf cannot be read" in finding.found) == ("wrong", True)
    assert "-v /etc/hccn.conf:/etc/hccn.conf" in finding.do


def test_the_tool_is_found_where_the_driver_has_it(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    (tmp_path / "etc/hccn.conf").unlink()
    folder = tmp_path / "usr/local/Ascend/driver/tools"
    folder.mkdir()
    (tmp_path / "bin/hccn_tool").rename(folder / "hccn_tool")
    assert addresses(built, 0).status == "ok"


@pytest.mark.parametrize("fixture", ["hccn_garbled.conf", "hccn_wrong_address.conf"])
def test_a_garbled_hccn_conf_is_a_finding(fixture: str, tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.copy("etc/hccn.conf", fixture)
    assert (addresses(built).status, "not understood" in addresses(built).found) == ("wrong", True)


def test_bytes_that_are_no_text_are_a_finding(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.write("etc/hccn.conf", b"\xff\xfe\x00address_0")
    assert addresses(built).status == "wrong"


def links(built: BuiltMachine) -> dict[str, Finding]:
    answer = cards.Cards([0, 1])
    return {each.name: each for each in cards.check_links(built.machine(), answer)}


def test_links_and_tls(tmp_path: Path) -> None:
    assert {name: each.status for name, each in links(ascend(tmp_path)).items()} == {"links": "ok", "TLS": "ok"}


@pytest.mark.parametrize(
    ("what", "fixture", "name", "status"),
    [
        ("-link", "hccn_tool_link_down.txt", "links", "wrong"),
        ("-link", "hccn_tool_garbled.txt", "links", "warning"),
        ("-tls", "hccn_tool_tls_on.txt", "TLS", "wrong"),
        ("-tls", "hccn_tool_garbled.txt", "TLS", "warning"),
    ],
)
def test_one_card_differs(what: str, fixture: str, name: str, status: str, tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.answers(
        "hccn_tool",
        {
            f"'-i 1 {what} -g'": fixture,
            "*-link*": "hccn_tool_link_up.txt",
            "*-tls*": "hccn_tool_tls_off.txt",
        },
    )
    finding = links(built)[name]
    assert finding.status == status
    assert finding.do


def test_no_tool_for_links(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    (tmp_path / "bin/hccn_tool").unlink()
    assert links(built)["links"].status == "warning"


# ---- the library ----


def probed(*libraries: str, error: str = "", before: tuple[str, ...] = ()) -> Probed:
    return Probed(error=error, after=list(libraries), before=list(before))


def check(built: BuiltMachine, answer: Probed) -> Finding:
    return library.check_library(built.machine(), answer)


def test_a_library_that_the_loader_takes(tmp_path: Path) -> None:
    finding = check(ascend(tmp_path), probed("/cann/lib64/libllm_datadist.so", "/cann/lib64/libmetadef.so"))
    assert finding.status == "ok"
    assert "loaded from /cann/lib64/libllm_datadist.so; with libmetadef.so" in finding.found


def test_no_library(tmp_path: Path) -> None:
    finding = check(ascend(tmp_path), probed(error="cannot open"))
    assert (finding.status, "set_env.sh" in finding.do) == ("wrong", True)
    assert "/usr/local/Ascend/cann/lib64" in finding.found


def test_a_library_that_is_not_searched(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.write(LIBRARY, "ELF")
    finding = check(built, probed(error="cannot open"))
    assert (finding.status, "not where libraries are searched" in finding.found) == ("wrong", True)
    built.environ["LD_LIBRARY_PATH"] = "/usr/local/Ascend/cann/lib64"
    finding = check(built, probed(error="a symbol is missing"))
    assert (finding.status, finding.found) == ("wrong", f"{tmp_path}/{LIBRARY} is refused")


def test_a_library_that_the_environment_names(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.environ[library.VARIABLE] = "/opt/cann/libllm_datadist.so"
    finding = check(built, probed(error="cannot open"))
    assert (finding.status, "which is not there" in finding.found) == ("wrong", True)
    built.write("opt/cann/libllm_datadist.so", "ELF")
    assert "is refused" in check(built, probed(error="a symbol is missing")).found
    assert check(built, probed("/opt/cann/libllm_datadist.so")).status == "ok"


def test_who_loaded_it_and_the_v1_library(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.write(LIBRARY, "ELF")
    built.environ["LD_LIBRARY_PATH"] = "/usr/local/Ascend/cann/lib64"
    names = ("/cann/libllm_datadist.so", "/cann/libllm_engine.so")
    finding = check(built, probed(*names, error="refused", before=names))
    assert "loaded before us, by LD_PRELOAD or an import: /cann/libllm_datadist.so" in finding.found
    assert "V1 library loaded beside it: /cann/libllm_engine.so" in finding.found


def test_our_own_library_of_the_same_name(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    (ours,) = Path(vllm_datadist_connector.__path__[0]).glob("lib/libllm_datadist.so")
    built.write(LIBRARY, ours.read_bytes())
    finding = check(built, probed(error="it is ours"))
    assert (finding.status, "this package's own" in finding.found) == ("wrong", True)


def test_versions_of_cann_and_driver(tmp_path: Path) -> None:
    built = ascend(tmp_path)

    def told() -> dict[str, Finding]:
        return {each.name: each for each in library.check_versions(built.machine(), Probed())}

    assert told()["CANN"].status == "warning"
    assert told()["HDK driver"] == Finding("HDK driver", "ok", "25.5.1")
    file = f"usr/local/Ascend/cann/{platform.machine()}-linux/ascend_toolkit_install.info"
    built.copy(file, "ascend_toolkit_install.info")
    assert told()["CANN"].status == "ok"
    built.write(file, "version=8.2.RC1\n")
    assert (told()["CANN"].status, "8.2.RC1" in told()["CANN"].found) == ("warning", True)
    built.write(file, "garbled")
    built.write("usr/local/Ascend/driver/version.info", "garbled")
    assert told()["CANN"].status == told()["HDK driver"].status == "warning"
    assert told()["torch-npu"].status == told()["vllm-ascend"].status == "wrong"


# ---- the rest ----


def everything(built: BuiltMachine, *command: str, config: str | None = None, model: str = "") -> dict[str, Finding]:
    found = checks.check_ascend(built.machine(), deployment(*command, config=config), model, Probed())
    return {each.name: each for each in found}


def test_a_machine_where_all_is_well(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    findings = everything(built, config=config(host="192.0.2.1", insecure=True, pull_timeout_s=40.0))
    wrong = {name for name, each in findings.items() if each.status == "wrong"}
    assert wrong == {"torch-npu", "vllm-ascend"}  # which no machine of these tests has
    assert findings["time-outs"].status == "ok"
    assert findings["blocks of running steps"].status == "ok"


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", "warning"), ("192.0.2.1", "ok"), ("2001:db8::1", "wrong")])
def test_host_addresses(host: str, status: str, tmp_path: Path) -> None:
    finding = everything(ascend(tmp_path), config=config(host=host, insecure=True))["host address for CANN"]
    assert finding.status == status


def test_time_outs(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    finding = everything(built)["time-outs"]
    assert (finding.status, "a pull gives up after 20 s, the hardware after 33.1 s" in finding.found) == (
        "warning",
        True,
    )
    assert "HCCL_RDMA_TIMEOUT=19 on both ends" in finding.do
    built.environ["HCCL_RDMA_TIMEOUT"] = "19"
    assert everything(built)["time-outs"].status == "ok"
    built.environ["HCCL_RDMA_TIMEOUT"] = "long"
    finding = everything(built)["time-outs"]
    assert (finding.status, "HCCL_RDMA_TIMEOUT" in finding.found) == ("wrong", True)


CAPABILITIES = HARDWARE._asdict()


def adapted(environ: dict[str, str], text: str) -> tuple[Deployment, list[Finding]]:
    return adapt(deployment(config=text), Probed(capabilities=CAPABILITIES), environ)


def test_time_limits_are_those_that_a_worker_will_have() -> None:
    found, (finding,) = adapted({}, config())
    assert found.config.pull_timeout_s == pytest.approx(33.06, abs=0.01)
    assert (finding.status, "link_timeout_s 60" in finding.found) == ("ok", True)
    assert adapted({"ASCEND_TRANSFER_TIMEOUT": "40000"}, config())[0].config.pull_timeout_s == 40.0
    assert adapted({}, config(pull_timeout_s=5.0))[0].config.pull_timeout_s == 5.0


@pytest.mark.parametrize(
    ("environ", "text", "told"),
    [
        ({"ASCEND_TRANSFER_TIMEOUT": "2m"}, config(), "ASCEND_TRANSFER_TIMEOUT"),
        ({}, config(transport="cma"), "transport: 'cma'"),
        ({}, config(link_timeout_s=1.0), "link_timeout_s: 1.0"),
        ({}, config(host="2001:db8::1", insecure=True), "IPv4 only"),
        ({}, config("kv_both"), "kv_role: kv_both"),
        ({}, config(bidirectional=True), "bidirectional"),
    ],
)
def test_what_the_provider_cannot_follow(environ: dict[str, str], text: str, told: str) -> None:
    _, (finding,) = adapted(environ, text)
    assert (finding.status, told in finding.found) == ("wrong", True)


def test_a_provider_that_is_not_there_follows_nothing() -> None:
    ours = deployment()
    assert adapt(ours, Probed(error="absent"), {}) == (ours, [])


def test_local_comm_res(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    assert everything(built)["local_comm_res"].found.startswith("left to CANN")
    assert everything(built, config=config(local_comm_res='{"version": "1.3"}'))["local_comm_res"].status == "ok"
    finding = everything(built, config=config(local_comm_res="/no/such/file"))["local_comm_res"]
    assert (finding.status, "/no/such/file" in finding.found) == ("wrong", True)


def test_nz_and_the_allocator(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    assert "enable_kv_nz" not in everything(built)
    for value, status in (('{"enable_kv_nz": true}', "warning"), ("{}", "ok"), ("{", "wrong")):
        assert everything(built, f"--additional-config={value}")["enable_kv_nz"].status == status
    assert everything(built)["allocator"].status == "ok"
    built.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"
    assert everything(built)["allocator"].status == "warning"


def test_plugins_of_vllm_ascend(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    built.environ["VLLM_PLUGINS"] = "datadist,ascend"
    finding = everything(built)["plugins of vllm-ascend"]
    assert (finding.status, "ascend_kv_connector" in finding.do) == ("wrong", True)
    built.environ["VLLM_PLUGINS"] = "datadist,ascend,ascend_kv_connector"
    assert "plugins of vllm-ascend" not in everything(built)


@pytest.mark.parametrize(("source", "told"), [("self.defer_block_free = True", "has ended"), ("", "fence active")])
def test_whether_the_fence_is_needed(source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm"
    (package / "v1/core/sched").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "v1/core/sched/scheduler.py").write_text(source)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(package / "__init__.py"))
    )
    assert told in checks.check_fence().found


def test_the_model_is_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 200}))
    findings = everything(ascend(tmp_path), "-pp", "2", model=str(tmp_path))
    assert findings["memory regions"].status == "ok"


def test_a_machine_without_npus(tmp_path: Path) -> None:
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    assert not checks.is_ascend(BuiltMachine(tmp_path / "without").machine())
    assert checks.is_ascend(ascend(tmp_path / "with").machine())


def test_where_there_are_npus_the_whole_doctor_looks_at_cann(tmp_path: Path) -> None:
    built = ascend(tmp_path)
    findings = {each.name: each for each in examine(built.machine(), Question())}
    assert findings["libllm_datadist.so"].status == "wrong"
    assert findings["provider"].found.startswith("cann: ")
    assert "transport cma" not in findings
