"""Argument checks: which exception, what it says, what passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_datadist_connector.llm_datadist.utils.utils import (
    check_dict,
    check_int32,
    check_int64,
    check_isinstance,
    check_list_element,
    check_uint8,
    check_uint16,
    check_uint32,
    check_uint64,
    int_to_ip,
    ip_to_int,
    is_valid_layer_range,
)


def test_type() -> None:
    check_isinstance("x", 1, int)
    check_isinstance("x", True, int)
    check_isinstance("x", None, int)
    with pytest.raises(TypeError, match=r"^x: '1' \(str\), only support int or float$"):
        check_isinstance("x", "1", (int, float))
    with pytest.raises(TypeError, match=r"x: None .*only support int"):
        check_isinstance("x", None, int, allow_none=False)


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(TypeError) as caught:
        check_isinstance("x", "y" * 1000, int)
    assert len(str(caught.value)) < 150


WIDTHS = [
    (check_uint8, 0, 2**8 - 1),
    (check_uint16, 0, 2**16 - 1),
    (check_uint32, 0, 2**32 - 1),
    (check_uint64, 0, 2**64 - 1),
    (check_int32, -(2**31), 2**31 - 1),
    (check_int64, -(2**63), 2**63 - 1),
]


@pytest.mark.parametrize(("check", "lowest", "highest"), WIDTHS)
def test_width(check: Callable[[str, object], None], lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        check("x", value)
    for value in (lowest - 1, highest + 1):
        with pytest.raises(ValueError, match=rf"^x: {value}, value is out of range \[{lowest}, {highest}\]$"):
            check("x", value)
    for wrong in (None, 1.0, "1"):
        with pytest.raises(TypeError, match=r"x: .*only support int"):
            check("x", wrong)


def test_list_element() -> None:
    check_list_element("x", [1, True], int)
    check_list_element("x", (), int)
    check_list_element("x", None, int)
    with pytest.raises(TypeError, match=r"x\[1\]: None \(NoneType\), inner type only support int"):
        check_list_element("x", [1, None], int)
    with pytest.raises(TypeError, match=r"x: \{1\} .*only support list or tuple"):
        check_list_element("x", {1}, int)
    with pytest.raises(TypeError, match=r"x: None .*only support list$"):
        check_list_element("x", None, int, allow_none=False, containers=list)


def test_dict() -> None:
    check_dict("x", {1: "a"}, int, str)
    check_dict("x", None, int, str)
    with pytest.raises(TypeError, match=r"x: key 'a' .*dict key only support int"):
        check_dict("x", {"a": "a"}, int, str)
    with pytest.raises(TypeError, match=r"x\[1\]: 2 .*dict value only support str"):
        check_dict("x", {1: 2}, int, str)
    with pytest.raises(TypeError, match=r"x: \[\] .*only support dict"):
        check_dict("x", [], int, str)


@pytest.mark.parametrize(
    ("layers", "valid"),
    [
        (range(1), True),
        (range(3, 7), True),
        (range(0), False),
        (range(2, 1), False),
        (range(-1, 2), False),
        (range(0, 4, 2), False),
        (range(4, 0, -1), False),
    ],
)
def test_layer_range(layers: range, valid: bool) -> None:
    assert is_valid_layer_range(layers) is valid


def test_ip() -> None:
    assert ip_to_int("127.0.0.1") == 0x0100007F
    assert int_to_ip(0x0100007F) == "127.0.0.1"
    for text in ("", "localhost", "::1", "1.2.3.256"):
        with pytest.raises(RuntimeError, match=f"Can not parse ip str: '{text}'"):
            ip_to_int(text)
