"""What the examples need beside LLM-DataDist: their arguments, and two processes that wait for each other."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

PROMPT_CLUSTER = 1
DECODER_CLUSTER = 2
PATIENCE_S = 60


@dataclass(frozen=True)
class Address:
    ip: str
    port: int

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}"


@dataclass(frozen=True)
class Pair:
    """Where both processes listen, and how they talk: a line at a time by a named pipe for each direction."""

    prompt: Address
    decoder: Address
    inbox: int
    outbox: int

    def tell(self, line: object) -> None:
        os.write(self.outbox, f"{line}\n".encode())

    def hear(self) -> str:
        """The other's next line. One that died must not make us wait for ever."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.inbox], [], [], PATIENCE_S)[0]:
                raise TimeoutError("the other process says nothing")
            line += os.read(self.inbox, 1)
        return line[:-1].decode()

    def expect(self, line: str) -> None:
        heard = self.hear()
        if heard != line:
            raise RuntimeError(f"expected {line!r} of the other process, heard {heard!r}")


def start(role: LLMRole, cluster_id: int, listen: Address | None = None, **options: object) -> LLMDataDist:
    """An LLMDataDist with a cache manager; `options` are properties of LLMConfig."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    if listen is not None:
        config.listen_ip_info = str(listen)
    for name, value in options.items():
        setattr(config, name, value)
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def cluster_at(cluster_id: int, remote: Address, local: Address) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    cluster.append_remote_ip_info(remote.ip, remote.port)
    cluster.append_local_ip_info(local.ip, local.port)
    return cluster


def link(datadist: LLMDataDist, cluster: LLMClusterInfo) -> None:
    status, each = datadist.link_clusters([cluster], timeout=10_000)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"link_clusters: {each}")


def unlink(datadist: LLMDataDist, cluster: LLMClusterInfo) -> None:
    status, each = datadist.unlink_clusters([cluster], timeout=10_000)
    if status != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"unlink_clusters: {each}")


def check(what: str, is_right: object) -> None:
    if not is_right:
        raise RuntimeError(f"{what}: not what was expected")
    print(f"{what}: as expected")


def _pipe(path: Path) -> int:
    """Whoever comes first makes it. Open for both directions it waits for nobody, and no line is lost."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR)


def _address(text: str) -> Address:
    ip, _, port = text.rpartition(":")
    return Address(ip, int(port))


def run(prompt: Callable[[Pair], None], decoder: Callable[[Pair], None]) -> None:
    """Does what the command line says: ROLE PROMPT_IP:PORT DECODER_IP:PORT DIRECTORY."""
    roles = {"prompt": prompt, "decoder": decoder}
    if len(sys.argv) != 5 or sys.argv[1] not in roles:
        sys.exit(f"usage: {sys.argv[0]} (prompt | decoder) PROMPT_IP:PORT DECODER_IP:PORT DIRECTORY")
    role, directory = sys.argv[1], Path(sys.argv[4])
    pipes = {name: _pipe(directory / f"to_{name}") for name in roles}
    other = "decoder" if role == "prompt" else "prompt"
    roles[role](Pair(_address(sys.argv[2]), _address(sys.argv[3]), pipes[role], pipes[other]))
    print(f"{role}: done")
