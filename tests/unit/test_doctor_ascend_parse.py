"""The doctor's parsers, on outputs of the tools of Ascend machines: whatever comes is read, or shown as garbled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.machines import FIXTURES

from vllm_datadist_connector.doctor.ascend.parse import (
    Chip,
    GarbledError,
    parse_hccn_conf,
    parse_info,
    parse_ip,
    parse_link,
    parse_npu_map,
    parse_tls,
    parse_visible,
    version_numbers,
)


def text(fixture: str) -> str:
    return (FIXTURES / fixture).read_text(encoding="utf-8")


def test_hccn_conf() -> None:
    assert parse_hccn_conf(text("hccn.conf")) == {card: f"192.168.{100 + card}.101" for card in (0, 1, 2, 3, 10)}
    assert parse_hccn_conf("") == {}


def test_hccn_tool() -> None:
    assert parse_ip(text("hccn_tool_ip.txt")) == "192.168.100.101"
    assert parse_link(text("hccn_tool_link_up.txt")) is True
    assert parse_link(text("hccn_tool_link_down.txt")) is False
    assert parse_tls(text("hccn_tool_tls_on.txt")) is True
    assert parse_tls(text("hccn_tool_tls_off.txt")) is False


@pytest.mark.parametrize(
    ("fixture", "chips"),
    [
        ("npu_smi_map_a2.txt", [Chip(0, 0, 0, 4, "Ascend 910B3"), Chip(1, 0, 1, 5, "Ascend 910B3")]),
        (
            "npu_smi_map_a3.txt",
            [Chip(npu, chip, 2 * npu + chip, 2 * npu + chip, "Ascend910") for npu in (0, 1) for chip in (0, 1)],
        ),
        ("npu_smi_map_older.txt", [Chip(8, 0, 0, None, "Ascend 910B"), Chip(9, 0, 1, None, "Ascend 910B")]),
        ("npu_smi_map_with_slots.txt", [Chip(0, 0, 0, 0, "Ascend950PR"), Chip(1, 0, 1, 1, "Ascend950PR")]),
    ],
)
def test_npu_smi(fixture: str, chips: list[Chip]) -> None:
    assert parse_npu_map(text(fixture)) == chips


@pytest.mark.parametrize(
    ("parse", "fixture"),
    [
        (parse_hccn_conf, "hccn_garbled.conf"),
        (parse_hccn_conf, "hccn_wrong_address.conf"),
        (parse_ip, "hccn_tool_ip_failed.txt"),
        (parse_ip, "hccn_tool_garbled.txt"),
        (parse_link, "hccn_tool_garbled.txt"),
        (parse_tls, "hccn_tool_garbled.txt"),
        (parse_npu_map, "npu_smi_map_garbled.txt"),
        (parse_npu_map, "npu_smi_map_failed.txt"),
        (version_numbers, "hccn_tool_garbled.txt"),
        (parse_visible, "hccn_tool_garbled.txt"),
    ],
)
def test_what_is_garbled_is_shown(parse: Callable[[str], object], fixture: str) -> None:
    with pytest.raises(GarbledError, match=r"not understood: '.+'"):
        parse(text(fixture))


PARSERS = (parse_hccn_conf, parse_ip, parse_link, parse_tls, parse_npu_map, parse_visible, version_numbers)


def feed_parsers(anything: str) -> None:
    for parse in PARSERS:
        with contextlib.suppress(GarbledError):
            parse(anything)
    parse_info(anything)


@given(st.text())
def test_no_text_breaks_a_parser(anything: str) -> None:
    feed_parsers(anything)


@given(st.sampled_from(sorted(FIXTURES.iterdir())), st.integers(0, 600), st.integers(0, 60), st.text(max_size=8))
def test_no_cut_breaks_a_parser(fixture: Path, start: int, length: int, instead: str) -> None:
    whole = fixture.read_text(encoding="utf-8")
    feed_parsers(whole[:start] + instead + whole[start + length :])


@pytest.mark.parametrize("text", ["", "4,4", "4 5", "-1", "all"])
def test_visible_devices_that_are_none(text: str) -> None:
    with pytest.raises(GarbledError):
        parse_visible(text)


def test_versions() -> None:
    assert parse_info(text("ascend_toolkit_install.info"))["version"] == "8.5.0"
    assert [version_numbers(each) for each in ("8.5.0", "8.0.RC1", "9.1.0-beta.1")] == [(8, 5), (8, 0), (9, 1)]
