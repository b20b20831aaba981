"""`python -m vllm_datadist_connector.llm_datadist`: programs that say `import llm_datadist` run as python runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = [sys.executable, "-m", "vllm_datadist_connector.llm_datadist"]


def run(*arguments: object, cwd: Path, runner: list[str] = RUNNER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*runner, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def run_text(tmp_path: Path, text: str, *arguments: object) -> str:
    script = tmp_path / "script.py"
    script.write_text(text)
    done = run(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_import_gives_the_one_module(tmp_path: Path) -> None:
    run_text(
        tmp_path,
        "import llm_datadist, llm_datadist.configs\n"
        "from llm_datadist import *\n"
        "from llm_datadist import LLMException, v2\n"
        "from llm_datadist.status import LLMException as by_module\n"
        "from llm_datadist.v2.cache_manager import CacheManager\n"
        "from llm_datadist.utils import log\n"
        "import llm_datadist_v1\n"
        "from llm_datadist_v1.kv_cache_manager import KvCacheManager as legacy\n"
        "import vllm_datadist_connector.llm_datadist as ours\n"
        "import vllm_datadist_connector.llm_datadist.v2.cache_manager as our_manager\n"
        "assert llm_datadist is ours\n"
        "assert llm_datadist.configs is ours.configs\n"
        "assert LLMException is by_module is ours.LLMException\n"
        "assert v2 is ours.v2 and log is ours.utils.log\n"
        "assert CacheManager is our_manager.CacheManager\n"
        "assert llm_datadist_v1 is ours.v1\n"
        "assert legacy is KvCacheManager is ours.KvCacheManager\n"
        "assert ours.status.__name__ == ours.status.__spec__.name == 'vllm_datadist_connector.llm_datadist.status'\n",
    )


def test_a_module_that_does_not_exist(tmp_path: Path) -> None:
    run_text(
        tmp_path,
        "try:\n"
        "    import llm_datadist.no_such_module\n"
        "except ModuleNotFoundError as error:\n"
        "    assert error.name == 'llm_datadist.no_such_module', error.name\n"
        "else:\n"
        "    raise SystemExit('imported')\n",
    )


def test_another_package_of_that_name_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "llm_datadist.py").write_text("raise SystemExit('the other one')")
    run_text(tmp_path, "import llm_datadist\nassert llm_datadist.LLMDataDist\n")


FACTS = """
import sys
print(__name__, __file__, __spec__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
import beside
"""


def test_a_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "script.py").write_text(FACTS)
    (folder / "beside.py").write_text("print('beside')")
    arguments = ["folder/script.py", "-m", "--flag", "a b"]
    ours = run(*arguments, cwd=tmp_path)
    plain = run(*arguments, cwd=tmp_path, runner=[sys.executable])
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, "")


def test_a_module_sees_what_python_would_show_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(FACTS.replace("__spec__, ", "__spec__.name, "))
    (tmp_path / "beside.py").write_text("print('beside')")
    arguments = ["-m", "program", "-x", "a b"]
    ours = run(*arguments, cwd=tmp_path)
    plain = run(*arguments, cwd=tmp_path, runner=[sys.executable])
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, "")


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(7)",
        "raise SystemExit('a reason')",
        "def f():\n    1 / 0\n\nf()\n",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('x') from error\n",
        "def f(:\n",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    ],
)
def test_ends_as_python_ends(tmp_path: Path, text: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    ours = run(script, cwd=tmp_path)
    plain = run(script, cwd=tmp_path, runner=[sys.executable])
    assert plain.returncode != 0
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_an_interrupt_ends_it_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import signal\nprint('ready', flush=True)\nsignal.pause()\n")
    process = subprocess.Popen(
        [*RUNNER, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell starts its background jobs with SIGINT ignored, and the tests may be in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert stderr.endswith("KeyboardInterrupt\n")


def test_processes_that_it_starts_find_the_package(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        "from llm_datadist.status import LLMStatusCode\nprint(int(LLMStatusCode.LLM_FAILED))"
    )
    text = (
        "import multiprocessing, subprocess, sys\n"
        "from llm_datadist import LLMException\n"
        "def work():\n"
        "    import llm_datadist_v1, llm_datadist\n"
        "    assert llm_datadist.LLMException is LLMException\n"
        "    assert llm_datadist_v1.KvCacheManager is llm_datadist.KvCacheManager\n"
        "if __name__ == '__main__':\n"
        "    for method in ('spawn', 'forkserver', 'fork'):\n"
        "        child = multiprocessing.get_context(method).Process(target=work)\n"
        "        child.start()\n"
        "        child.join()\n"
        "        assert child.exitcode == 0, method\n"
        "    subprocess.run([sys.executable, 'child.py'], check=True)\n"
    )
    assert run_text(tmp_path, text) == "4294967295\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage: "),
        (["-m"], 2, "usage: "),
        (["--what"], 2, "usage: "),
        (["missing.py"], 2, "can't open file 'missing.py'"),
    ],
)
def test_called_wrongly(tmp_path: Path, arguments: list[str], code: int, text: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith(text)
    assert done.stdout == ""


def test_help(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


# ---- the same name without the runner ----


def test_a_program_that_is_running_gets_the_name() -> None:
    text = (
        "from vllm_datadist_connector.llm_datadist import aliases\n"
        "aliases.install()\n"
        "import llm_datadist, vllm_datadist_connector.llm_datadist as ours\n"
        "from llm_datadist.v2.cache_manager import CacheManager\n"
        "print(llm_datadist is ours, CacheManager.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True CacheManager\n"), done.stderr


TYPED = """
import llm_datadist
from llm_datadist.configs import LLMClusterInfo
from llm_datadist.status import LLMStatusCode
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist_v1.llm_types import KvCache


def use(datadist: llm_datadist.LLMDataDist, manager: CacheManager, cache: KvCache) -> LLMStatusCode:
    manager.pull_cache(llm_datadist.CacheKey(1, 2), cache)
    return datadist.link_clusters([LLMClusterInfo()])[0]


def misuse(datadist: llm_datadist.LLMDataDist) -> None:
    datadist.link_clusters(5)
"""


def test_a_type_checker_finds_the_name(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    assert run("--stubs", "typings", cwd=tmp_path).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "typed.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": "typings"},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert 'Argument 1 to "link_clusters" of "LLMDataDist" has incompatible type "int"' in errors[0]
    assert errors[0].startswith("typed.py:15:")
