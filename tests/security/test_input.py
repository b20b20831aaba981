"""What HTTP clients and peers say is checked by code that runs, before it costs anything."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.pd import make_geometry, make_params, make_ticket

from vllm_datadist_connector.protocol.handshake import decode_geometry
from vllm_datadist_connector.protocol.params import EXTRA_KEY, ParamsError, parse_remote_prefill

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_datadist_connector"
NATIVE = sorted((ROOT / "native" / "src").rglob("*.cc")) + sorted((ROOT / "native" / "src").rglob("*.h"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_cve_2026_94623_no_assert_in_the_package(path: Path) -> None:
    """One that a peer's words can reach ends the process; as a check it is gone under python -O."""
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_cve_2026_94623_no_assert_in_the_engine(path: Path) -> None:
    assert not re.search(r"(?<!static_)\bassert\s*\(|\babort\s*\(", path.read_text())


OPTIMIZED = """
import pkgutil, sys
import vllm_datadist_connector
from vllm_datadist_connector.protocol import params

WITHOUT_VLLM = ("cli", "config", "llm_datadist", "protocol", "side_channel")
if __debug__:
    raise SystemExit("this must run without asserts")
for module in pkgutil.walk_packages(vllm_datadist_connector.__path__, "vllm_datadist_connector."):
    if module.name.split(".")[1] in WITHOUT_VLLM and not module.name.endswith("__"):
        __import__(module.name)
refused = 0
for bad in ({}, {"remote_block_ids": [[-1]]}, {"remote_port": 0}, {"datadist": None}):
    try:
        params.parse_remote_prefill(bad)
    except params.ParamsError:
        refused += 1
print(refused)
"""


def test_cve_2026_41523_checks_hold_without_asserts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPTIMIZED],
        env={**os.environ, "PYTHONOPTIMIZE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["4"]), done.stderr


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SIZES: dict[str, dict[str, Any]] = {
    **{name: {name: 10**9} for name in ("tp_size", "pp_size", "dcp_size", "remote_num_tokens")},
    "block": {"remote_block_ids": [[10**12]]},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
def test_cve_2026_94626_sizes_in_params_cost_nothing(changes: dict[str, Any]) -> None:
    params = make_params() | changes

    def parse() -> None:
        try:
            parse_remote_prefill(params)
        except ParamsError:
            return

    assert peak_of(parse) < 100_000


def test_cve_2026_94626_sizes_in_tickets_are_refused() -> None:
    params = make_params(ticket=make_ticket())
    params[EXTRA_KEY]["block_sizes"] = [2**31]
    with pytest.raises(ParamsError, match="block_sizes"):
        parse_remote_prefill(params)


@pytest.mark.parametrize("field", ["tp_size", "pp_size", "tp_rank", "pp_rank"])
def test_cve_2026_94626_sizes_of_a_peers_geometry_are_refused(field: str) -> None:
    lie = msgspec.msgpack.encode(msgspec.to_builtins(make_geometry()) | {field: 10**9})
    with pytest.raises(msgspec.ValidationError, match=field):
        decode_geometry(lie)


# Headers of msgpack that announce 2**32 - 1 bytes, elements or pairs.
ANNOUNCED = {"bytes": b"\xc6", "text": b"\xdb", "array": b"\xdd", "map": b"\xdf", "extension": b"\xc9"}


@pytest.mark.parametrize("header", ANNOUNCED.values(), ids=ANNOUNCED.keys())
def test_cve_2026_94626_announced_lengths_cost_nothing(header: bytes) -> None:
    """Of a geometry, all that crosses in msgpack; for the engine's frames: native/tests/frame_test.cc."""
    for body in (header, b"\x81\xa6caches" + header):

        def refuse(body: bytes = body) -> None:
            with pytest.raises(msgspec.DecodeError):
                decode_geometry(body + b"\xff" * 4)

        assert peak_of(refuse) < 1_000_000
