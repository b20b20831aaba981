"""Another machine for the doctor: a folder with the files and programs that it has."""

from __future__ import annotations

from pathlib import Path

from vllm_datadist_connector.doctor.machine import Machine

FIXTURES = Path(__file__).parents[1] / "unit" / "fixtures"


class BuiltMachine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {"PATH": f"{root}/bin"}
        (root / "bin").mkdir()

    def machine(self) -> Machine:
        return Machine(self.root, self.environ)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy(self, name: str, fixture: str) -> Path:
        return self.write(name, (FIXTURES / fixture).read_bytes())

    def program(self, name: str, script: str) -> None:
        self.write(f"bin/{name}", f"#!/bin/sh\n{script}\n").chmod(0o755)

    def answers(self, name: str, fixtures: dict[str, str]) -> None:
        """A program that shows a fixture for arguments that match a pattern of the shell's."""
        cases = "\n".join(f"  {pattern}) exec /bin/cat {FIXTURES / each} ;;" for pattern, each in fixtures.items())
        self.program(name, f'case "$*" in\n{cases}\n  *) echo "unknown: $*"; exit 1 ;;\nesac')


def ascend(root: Path, cards: tuple[int, ...] = (0, 1)) -> BuiltMachine:
    """Two cards of an Atlas A3 in a container where everything is as it should be."""
    built = BuiltMachine(root)
    for card in cards:
        built.write(f"dev/davinci{card}", "")
    built.write("dev/davinci_manager", "")
    built.copy("etc/hccn.conf", "hccn.conf")
    built.answers("npu-smi", {"'info -m'": "npu_smi_map_a3.txt"})
    built.answers(
        "hccn_tool",
        {
            "'-i '*' -ip -g'": "hccn_tool_ip.txt",
            "'-i '*' -link -g'": "hccn_tool_link_up.txt",
            "'-i '*' -tls -g'": "hccn_tool_tls_off.txt",
        },
    )
    built.copy("usr/local/Ascend/driver/version.info", "driver_version.info")
    return built
