"""`vllm-datadist selftest`: on our engine everything is right, and what would be wrong is found. Real processes."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.endpoints import LOOPBACK
from support.standin import standin_variables

from vllm_datadist_connector.cli import main
from vllm_datadist_connector.selftest import hosts
from vllm_datadist_connector.selftest.bench import Bench, Place, Settings
from vllm_datadist_connector.selftest.command import ITEMS, NAMES, run_item
from vllm_datadist_connector.selftest.hosts import Supervisor
from vllm_datadist_connector.selftest.remote import ProcessWire
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

FAULTY = Path(__file__).parents[1] / "support" / "faulty_party.py"
COMMAND = (sys.executable, "-m", "vllm_datadist_connector.cli", "selftest")
TIMEOUT_S = 600


def selftest(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, "--json", *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_our_engine_is_right_and_the_report_can_be_pasted() -> None:
    status, report = selftest("--watch", "1")
    items = {item["name"]: item for item in report["items"]}
    assert [name for name in items if items[name]["status"] == "wrong"] == []
    assert status == 0
    assert tuple(items) == NAMES
    assert {name for name in items if items[name]["status"] == "skipped"} == {"region_over_4_gb"}
    assert items["region_over_4_gb"]["note"]
    assert items["registrations"]["numbers"]["regions"] == 1024
    assert items["unaligned_start"]["numbers"]["offsets"] == dict.fromkeys(("65536", "512", "2"), "LLM_SUCCESS")
    assert items["late_write"]["numbers"]["bytes_written_late"] == 0
    assert items["late_write"]["numbers"]["pulls_before"] >= 1
    assert items["fence"]["numbers"]["wrong"] == 0 < items["fence"]["numbers"]["wrong_without"]
    assert items["expandable_segments"]["numbers"] == dict.fromkeys(("off", "on"), "LLM_SUCCESS")
    assert items["bandwidth"]["numbers"]["transport"] == "cma"
    assert set(items["bandwidth"]["numbers"]["of_memcpy_by_run_bytes"]) == {
        str(1 << bits) for bits in (12, 14, 16, 18, 20, 22)
    }


@pytest.fixture
def cann(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the provider `cann` be found, with the given rules of what stands in for it."""

    def find(**rules: int) -> None:
        for name, value in standin_variables(**rules).items():
            monkeypatch.setenv(name, value)

    return find


CANN = ("--provider", "cann", "--memory", "host", "--watch", "2.5")


def test_another_provider_shows_what_it_is(cann: Callable[..., None]) -> None:
    cann(strict=1)
    status, report = selftest(*CANN)
    items = {item["name"]: item for item in report["items"]}
    assert [item for item in items.values() if item["status"] == "wrong"] == []
    assert status == 0
    numbers = {name: item["numbers"] for name, item in items.items()}
    assert numbers["registrations"]["regions"] == 256
    assert numbers["registrations"]["view_of_a_registered_region"] == "LLM_SUCCESS"
    assert numbers["registrations"]["addresses_per_registration"] == 240
    assert numbers["second_thread"]["with_enter_thread"] == "LLM_SUCCESS" != numbers["second_thread"]["without"]
    assert numbers["register_after_link"]["pull"].startswith("LLM_KV_CACHE_NOT_EXIST")
    assert numbers["bandwidth"]["transport"] == "not told"


def test_a_region_over_4_gb() -> None:
    status, report = selftest("--large", "--only", "region_over_4_gb")
    assert (status, report["items"][0]["status"]) == (0, "ok"), report


@pytest.mark.parametrize(
    ("fault", "item", "told"),
    [
        ("WrongByte", "views_of_one_memory", "bytes are wrong"),
        ("WrongByte", "bandwidth", "bytes are wrong"),
        ("WrongByte", "link_time", "bytes are wrong"),
        ("LateWriter", "late_write", "4 bytes were written after the forced unlink"),
        ("Immortal", "peer_death", "reported as alive"),
        ("Immortal", "peers_half", "B keeps its half of the link"),
        ("Crashing", "views_of_one_memory", "the process of the provider ended by signal SIGSEGV"),
        ("CountingViews", "registrations", "another view of a registered region counts as a region"),
        ("Promising", "registrations", "capability max_regions is 16, it takes 8"),
        ("Crashing", "crossing_links", "links that cross: the process of the provider ended by signal SIGSEGV"),
        ("Fenceless", "fence", "pulls behind a fence a step in flight has written"),
        ("InOrder", "fence", "too short to tell anything"),
        ("WholeSegments", "expandable_segments", "PYTORCH_NPU_ALLOC_CONF=expandable_segments:False"),
        ("OneThread", "second_thread", "the connector makes all of its pulls so"),
        ("Keeping", "peers_half", "LinkLlmClusters after a forced unlink"),
    ],
)
def test_what_is_wrong_is_found(fault: str, item: str, told: str) -> None:
    place = Place(LOOPBACK, "host", partial(ProcessWire, (sys.executable, str(FAULTY), fault)))
    patience_s = 0.3 if fault == "Immortal" else 30.0  # others notice; in their own time
    bench = Bench(place, place, Settings(provider="engine", pull_timeout_ms=10_000, watch_s=1.0, patience_s=patience_s))
    (chosen,) = (each for each in ITEMS if each.__name__ == item)
    result = run_item(chosen, bench)
    assert result.status == "wrong"
    assert told in result.note


# ---- two hosts ----


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    main(["key", str(path)])
    return path


@pytest.fixture
def other_host(key: Path) -> Iterator[str]:
    """Where `--role b` listens."""
    command = [*COMMAND, "--role", "b", "--address", f"{LOOPBACK}:0", "--auth", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def test_two_hosts(other_host: str, key: Path) -> None:
    """The peer that is killed is on the other one."""
    chosen = "views_of_one_memory,peers_half,late_write,peer_death"
    status, report = selftest(
        *("--role", "a", "--address", other_host, "--auth", str(key), "--only", chosen, "--watch", "0.5")
    )
    assert (status, report["hosts"]) == (0, 2), report
    assert [item["status"] for item in report["items"]] == ["ok"] * 4


def test_who_does_not_know_the_key_is_not_let_in(other_host: str, tmp_path: Path) -> None:
    main(["key", str(tmp_path / "another")])
    for trust in (["--auth", str(tmp_path / "another")], ["--insecure"]):
        done = subprocess.run(
            [*COMMAND, "--role", "a", "--address", other_host, *trust],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 1
        assert "key" in done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n" * 20, b"vllm-datadist selftest 1\n" + bytes(64), b""],
    ids=["http", "zeros", "nothing"],
)
def test_a_party_is_started_for_who_knows_the_key_only(said: bytes, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(hosts, "ProcessWire", lambda: started.append(True))
    supervisor = Supervisor(Endpoint(LOOPBACK, 0), Trust(auth=str(key)))
    thread = threading.Thread(target=supervisor.serve)
    thread.start()
    with socket.create_connection((LOOPBACK, supervisor.port)) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1 << 16):
                pass
    supervisor.close()
    thread.join()
    assert not started


def test_nobody_listens() -> None:
    done = subprocess.run(
        [*COMMAND, "--role", "a", "--address", f"{LOOPBACK}:1", "--insecure"],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "does `vllm-datadist selftest --role b` run there?" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--role", "a"],
        ["--address", f"{LOOPBACK}:1"],
        ["--role", "b", "--address", "0.0.0.0:1"],
        ["--role", "b", "--address", f"{LOOPBACK}:1", "--auth", "k", "--insecure"],
        ["--role", "a", "--address", "localhost:1", "--insecure"],
        ["--role", "a", "--address", "127.0.0.1", "--insecure"],
        ["--only", "no_such_item"],
        ["--links", "0"],
        ["--memory", "os:0"],
        ["--host", "localhost"],
    ],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["selftest", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_a_provider_that_is_not_there_is_named() -> None:
    status, report = selftest("--provider", "nobody's", "--memory", "host", "--only", "link_time")
    assert status == 1
    assert "nobody's" in report["items"][0]["note"]


def test_device_memory_by_way_of_torch() -> None:
    """On the one device of torch's that is everywhere."""
    status, report = selftest("--memory", "cpu", "--only", "views_of_one_memory")
    assert (status, report["memory"]) == (0, ["cpu", "cpu"]), report


def test_reports_come_as_they_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["selftest", "--only", "register_after_link"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ok       register_after_link (")
    assert out[1].strip() == "pull: LLM_SUCCESS"
    assert time.monotonic() - started < TIMEOUT_S
