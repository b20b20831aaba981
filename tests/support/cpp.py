"""Building C++ programs as a user of the installed package does, and running them in pairs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples" / "cpp"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
PAIR_TIMEOUT_S = 300


def tool(*names: str) -> str:
    """The first of these programs that is found: beside this Python, else on PATH."""
    for name in names:
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        if found:
            return found
    raise FileNotFoundError(f"none of {', '.join(names)} is installed; the package's extra `test` brings them along")


def output_of(command: list[str], **environment: str) -> str:
    """What the command prints; a failure shows all that it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def installed(option: str) -> Path:
    """What `python -m vllm_datadist_connector.cpp OPTION` prints, in a process that sees no sources of ours."""
    command = [sys.executable, "-I", "-m", "vllm_datadist_connector.cpp", option]
    return Path(output_of(command))


def cmake_build(source: Path, build: Path, *arguments: str, target: str = "all") -> Path:
    cmake = tool("cmake")
    output_of([cmake, "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *arguments])
    output_of([cmake, "--build", str(build), "--parallel", "2", "--target", target])
    return build


def cmake_install(build: Path, prefix: Path) -> None:
    output_of([tool("cmake"), "--install", str(build), "--prefix", str(prefix)])


def pkg_config_build(source: Path, output: Path, pkg_config_path: Path, standard: str = "c++17") -> Path:
    """What the README of the examples says: one compiler call with pkg-config's answers."""

    def ask(*arguments: str) -> list[str]:
        command = [tool("pkgconf", "pkg-config"), *arguments, "llm_datadist"]
        return shlex.split(output_of(command, PKG_CONFIG_PATH=str(pkg_config_path)))

    (library_dir,) = ask("--variable=libdir")
    flags = [*ask("--cflags", "--libs"), f"-Wl,-rpath,{library_dir}"]
    output_of([*COMPILER, f"-std={standard}", str(source), "-o", str(output), *flags])
    return output


def run_pair(program: Path, addresses: tuple[str, str]) -> tuple[str, str]:
    """Runs the program as prompt and as decoder; their outputs if both ended with 0, else RuntimeError with both."""
    with tempfile.TemporaryDirectory() as meeting:
        pair = [
            subprocess.Popen(
                [str(program), role, *addresses, meeting], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for role in ("prompt", "decoder")
        ]
        deadline = time.monotonic() + PAIR_TIMEOUT_S
        try:
            outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in pair]
        finally:
            for process in pair:
                process.kill()
                process.wait()
    statuses = [process.returncode for process in pair]
    if statuses != [0, 0]:
        raise RuntimeError(
            f"{program.name}: prompt ended with {statuses[0]}, decoder with {statuses[1]}\n"
            f"-- prompt\n{outputs[0]}-- decoder\n{outputs[1]}"
        )
    return outputs[0], outputs[1]
