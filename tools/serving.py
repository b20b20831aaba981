"""Starts and ends `vllm serve` and `vllm-router` on this machine, for the demo, the tests and the benchmarks.

Standard library only. Every program runs in a process group of its own, so that all the processes it has made can be
found and ended, whatever state they are in. Not in a session: where the kernel groups tasks by session to share out the
CPU (sched_autogroup_enabled), the ranks of one server, which poll, keep another server from running for half a minute.
Output goes to a log file whose tail is part of every failure message.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from console import Progress, tail

HOST = "127.0.0.1"
READY_DEADLINE_S = 600.0  # of a machine whose cores others use, too
STOP_GRACE_S = 20.0
POLL_S = 0.25
PAUSE_POLL_S = 0.002
# Below the kernel's usual ephemeral range, so that no outgoing connection takes a port between choice and use.
PORT_RANGE = range(20000, 32000)

SERVER_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_HOST_IP": HOST,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

WARM_UP = {"VLLM_CPU_CI_ENV": "0"}
"""For servers whose engine warms up before it serves."""


class ServingError(RuntimeError):
    """A server did not do what it should have; the message holds the end of its log."""


def free_port() -> int:
    """A port nobody listens on."""
    for port in random.sample(PORT_RANGE, len(PORT_RANGE)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServingError(f"no free port in {PORT_RANGE.start} to {PORT_RANGE.stop - 1}")


def members_of(leader: int) -> dict[int, str]:
    """Process id and state letter of the group that `leader` leads, and of what they have started, in whatever group it
    is; zombies are not counted."""
    states, parents, found = {}, {}, set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # Fields after the command's closing bracket: state, parent, group.
            fields = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            continue  # ended while we looked
        pid = int(entry)
        states[pid], parents[pid] = fields[0], int(fields[1])
        if int(fields[2]) == leader:
            found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: states[pid] for pid in found if states[pid] != "Z"}


class Started(Protocol):
    """A process that runs a program, and leads a process group; subprocess.Popen is one."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...


Launch = Callable[[Sequence[str], Mapping[str, str], Path, BinaryIO], Started]
"""Starts a command with these variables, in this directory, its output to this file."""


def spawn(command: Sequence[str], env: Mapping[str, str], cwd: Path, output: BinaryIO) -> Started:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd, process_group=0
    )


class Program:
    """One program and all processes it makes. Not for use by several threads."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        log: Path,
        env: Mapping[str, str],
        launch: Launch = spawn,
        host: str = HOST,
    ) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.log = log
        self._command = list(command)
        self._env = dict(env)
        self._launch = launch
        self._process: Started | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id, and id of the process group."""
        if self._process is None:
            raise ServingError(f"{self.name} does not run")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the program and returns at once; wait_ready() says when it serves."""
        if self.alive:
            raise ServingError(f"{self.name} already runs")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            output.write(f"$ {' '.join(self._command)}\n".encode())
            output.flush()
            # Not in the repository: its sources must not hide the installed package.
            self._process = self._launch(self._command, self._env, self.log.parent, output)

    def wait_ready(self, deadline_s: float = READY_DEADLINE_S, shown: Progress | None = None) -> None:
        """Returns when /health answers; ServingError if the program ends or the deadline passes first."""
        until = time.monotonic() + deadline_s
        while not self._healthy():
            if shown is not None:
                shown.tick()
            if not self.alive:
                raise ServingError(self.describe("ended before it served"))
            if time.monotonic() > until:
                raise ServingError(self.describe(f"did not serve within {deadline_s:.0f} s"))
            self._wait(POLL_S)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _wait(self, seconds: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every process of the program."""
        if self._process is None:
            return
        for pid in members_of(self._process.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def pause(self) -> None:
        """SIGSTOP to everything; returns when everything has stopped, which takes a busy machine a while."""
        if self._process is None:
            return
        until = time.monotonic() + STOP_GRACE_S
        while any(state not in "Tt" for state in members_of(self._process.pid).values()):
            if time.monotonic() > until:
                raise ServingError(self.describe("has processes that do not stop"))
            self.signal(signal.SIGSTOP)
            time.sleep(PAUSE_POLL_S)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 of everything; returns when nothing is left."""
        if self._process is None:
            return
        until = time.monotonic() + STOP_GRACE_S
        while True:
            self.signal(signal.SIGKILL)
            self._wait(POLL_S)
            if not members_of(self._process.pid):
                break
            if time.monotonic() > until:
                raise ServingError(self.describe("has processes that survive SIGKILL"))
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """Asks the program to end, and ends what has not within the grace time. Safe in any state, also paused."""
        stop(self)

    def ask_to_end(self) -> None:
        if self.alive and self._process is not None:
            self.resume()
            self._process.terminate()

    def wait_end(self) -> None:
        """kill() for what does not end by itself within the grace time."""
        self._wait(STOP_GRACE_S)
        self.kill()

    def describe(self, what: str) -> str:
        return f"{self.name} {what}; the end of {self.log}:\n{tail(self.log)}"


def stop(*programs: Program) -> None:
    """Program.stop() of all at once."""
    for program in programs:
        program.ask_to_end()
    for program in programs:
        program.wait_end()


@dataclass(frozen=True)
class ServerSpec:
    """What a `vllm serve` of a tiny model on this machine needs to know."""

    name: str
    model: Path
    kv_transfer: Mapping[str, object] | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    dtype: str = "float32"
    max_model_len: int = 8192
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 16
    kv_cache_bytes: int = 512 << 20
    block_size: int | None = None
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    host: str = HOST
    """Of its API."""


def vllm_server(spec: ServerSpec, bin_dir: Path, logs: Path, env: Mapping[str, str], launch: Launch = spawn) -> Program:
    """A `vllm serve` that is ready to be started."""
    port = free_port()
    command = [str(bin_dir / "vllm"), "serve", str(spec.model), "--host", spec.host, "--port", str(port)]
    command += ["--served-model-name", "tiny", "--dtype", spec.dtype, "--seed", "0"]
    command += ["--max-model-len", str(spec.max_model_len), "--max-num-seqs", str(spec.max_num_seqs)]
    command += ["--max-num-batched-tokens", str(spec.max_num_batched_tokens)]
    command += ["-tp", str(spec.tensor_parallel)]
    if spec.block_size is not None:
        command += ["--block-size", str(spec.block_size)]
    if spec.data_parallel > 1:
        command += ["--data-parallel-size", str(spec.data_parallel)]
    command += ["--kv-cache-memory-bytes", str(spec.kv_cache_bytes)]
    command += _pipeline(spec) if spec.pipeline_parallel > 1 else ["--enforce-eager"]
    if spec.kv_transfer is not None:
        command += ["--kv-transfer-config", json.dumps(spec.kv_transfer)]
    command += spec.arguments
    variables = {**env, **SERVER_VARIABLES, **(WARM_UP if spec.pipeline_parallel > 1 else {}), **spec.variables}
    return Program(spec.name, command, port, logs / f"{spec.name}.log", variables, launch, spec.host)


def _pipeline(spec: ServerSpec) -> list[str]:
    """vLLM's CPU build dies on the first request to a pipeline without a warm-up, which it skips in eager mode."""
    return ["-pp", str(spec.pipeline_parallel), "-cc.mode=2", "-cc.backend=eager"]


def pd_router(
    prefill: Iterable[str], decode: Iterable[str], bin_dir: Path, logs: Path, env: Mapping[str, str]
) -> Program:
    """A `vllm-router` in front of prefill and decode URLs, ready to be started."""
    port = free_port()
    command = [str(bin_dir / "vllm-router"), "--host", HOST, "--port", str(port), "--vllm-pd-disaggregation"]
    command += ["--kv-connector", "nixl", "--prometheus-host", HOST, "--prometheus-port", str(free_port())]
    for url in prefill:
        command += ["--prefill", url]
    for url in decode:
        command += ["--decode", url]
    return Program("router", command, port, logs / "router.log", env)


def overlap_router(
    prefill: str, decode: str, bin_dir: Path, logs: Path, env: Mapping[str, str], mode: str | None = None
) -> Program:
    """The router that sends both legs of a request at once, ready to be started; `mode`: its --transfer-mode."""
    port = free_port()
    command = [str(bin_dir / "python"), str(Path(__file__).with_name("overlap_router.py")), "--port", str(port)]
    command += ["--host", HOST, "--prefill", prefill, "--decode", decode]
    if mode is not None:
        command += ["--transfer-mode", mode]
    return Program("overlap-router", command, port, logs / "overlap-router.log", env)


def read_config(path: Path) -> dict[str, object]:
    """A kv-transfer configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ServingError(f"{path}: {type(config).__name__}, not a JSON object")
    return config


def post_json(url: str, body: Mapping[str, object], timeout_s: float) -> dict[str, object]:
    """POSTs `body` and returns the JSON object that comes back; ServingError with the answer's text otherwise."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            parsed = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServingError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{url}: {error}") from error
    if not isinstance(parsed, dict):
        raise ServingError(f"{url} answered {type(parsed).__name__}, not an object")
    return parsed
