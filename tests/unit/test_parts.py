"""tools/test.py: what its arguments select, and what its lanes do with commands that fail."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tools") not in sys.path:
    sys.path.insert(0, str(ROOT / "tools"))

import test as runner  # noqa: E402
from bootstrap import Environment  # noqa: E402

ENVIRONMENT = Environment(Path(sys.prefix))
A_FILE, A_TEST = "tests/unit/test_config.py", "tests/integration/test_statistics.py::test_x"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], list(runner.PARTS)),
        (["--only", "unit,lint"], ["lint", "unit"]),
        (["--", A_FILE], ["unit"]),
        (["--", "-q", A_TEST, A_FILE], ["unit", "integration"]),
        (["--", "tests/security"], ["unit"]),
        (["--only", "native,unit", "--", A_FILE], ["native", "unit"]),
        (["--", "-k", "config"], list(runner.PARTS)),
    ],
)
def test_parts_that_are_run(arguments: list[str], parts: list[str]) -> None:
    assert runner.parse_arguments(arguments)[0] == parts


@pytest.mark.parametrize("arguments", [["--only", "units"], ["--only", ","], ["--only", "e2e", "--", A_FILE]])
def test_parts_that_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.parse_arguments(arguments)
    assert "--only" in capsys.readouterr().err


def test_a_path_stands_in_for_the_folder() -> None:
    (step,) = runner.steps_of("unit", ENVIRONMENT, ["-q", A_FILE, A_TEST])
    assert step.command[1:] == (A_FILE, "-q")
    (step,) = runner.steps_of("unit", ENVIRONMENT, ["-q"])
    assert step.command[1:] == ("tests/unit", "tests/security", "-q")


def test_every_part_is_in_one_lane() -> None:
    assert sorted(part for lane in runner.LANES for part in lane) == sorted(runner.PARTS)


def lane(*steps: runner.Step) -> runner.Lane:
    return runner.Lane(ENVIRONMENT, deque(steps))


def python(name: str, code: str, log: Path | None = None) -> runner.Step:
    return runner.Step(name, (sys.executable, "-c", code), log=log)


def test_a_step_that_fails_ends_neither_its_lane_nor_the_other(tmp_path: Path) -> None:
    first = lane(python("bad", "raise SystemExit(3)"), python("good", ""), python("unit", "raise SystemExit(5)"))
    second = lane(python("logged", "print('100% tests passed, 0 failed')", tmp_path / "log"))
    outcomes = {outcome.name: outcome.problem for outcome in runner.run_lanes([first, second])}
    assert outcomes == {"bad": "exit status 3", "good": "", "unit": "no test ran", "logged": ""}


def test_lanes_run_at_the_same_time(tmp_path: Path) -> None:
    """Each of two steps waits until the other has begun."""
    meet = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
until = time.monotonic() + 30
while not other.exists():
    assert time.monotonic() < until
    time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    steps = [runner.Step(name, (sys.executable, "-c", meet, *names)) for name, names in (("a", (a, b)), ("b", (b, a)))]
    assert [outcome.problem for outcome in runner.run_lanes([lane(step) for step in steps])] == ["", ""]


def test_an_interrupted_run_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    endless = lane(python("endless", f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(600)"))
    advance = runner.Lane.advance

    def interrupted(self: runner.Lane) -> bool:
        if started.exists():
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(runner.Lane, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_lanes([endless])
    assert endless._process is not None
    assert endless._process.poll() is not None
