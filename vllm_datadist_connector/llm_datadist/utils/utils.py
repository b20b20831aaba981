"""Checks of arguments, by the documented conventions: TypeError for a type, ValueError for an integer's width.

Every message names the argument, what it was and what is allowed. None passes a type check unless `allow_none` is
False; it never passes a check of an integer's width. Subclasses pass, so a bool is an int.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import TypeAlias

Types: TypeAlias = type | tuple[type, ...]


class NamedIntEnum(IntEnum):
    """IntEnum whose text is `ClassName.NAME` on every Python, as it was everywhere before 3.11."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, format_spec: str) -> str:
        return format(int(self), format_spec) if format_spec else str(self)


class ValueObject:
    """Equal to another of its type whose fields are equal, and hashed by what does not change."""

    __slots__ = ()

    def _fields(self) -> tuple[object, ...]:
        """All that the object says."""
        raise NotImplementedError

    def _lasting_fields(self) -> tuple[object, ...]:
        return self._fields()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((type(self), self._lasting_fields()))


def _names(types: Types) -> str:
    return " or ".join(kind.__name__ for kind in (types if isinstance(types, tuple) else (types,)))


def _describe(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_isinstance(name: str, value: object, types: Types, allow_none: bool = True) -> None:
    """TypeError "... only support ..." unless `value` is of `types`, or None where that is allowed."""
    if value is None and allow_none:
        return
    if not isinstance(value, types):
        raise TypeError(f"{name}: {_describe(value)}, only support {_names(types)}")


def check_list_element(
    name: str, values: object, types: Types, allow_none: bool = True, containers: Types = (list, tuple)
) -> None:
    """TypeError unless `values` is one of `containers` and each element of `types` ("... inner type only support").

    `allow_none` is about `values`; an element that is None never passes.
    """
    check_isinstance(name, values, containers, allow_none)
    if not isinstance(values, (list, tuple)):
        return
    for index, value in enumerate(values):
        if not isinstance(value, types):
            raise TypeError(f"{name}[{index}]: {_describe(value)}, inner type only support {_names(types)}")


def check_dict(name: str, value: object, key_types: Types, value_types: Types, allow_none: bool = True) -> None:
    """TypeError unless `value` is a dict of these ("... dict key only support", "... dict value only ...")."""
    check_isinstance(name, value, dict, allow_none)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if not isinstance(key, key_types):
            raise TypeError(f"{name}: key {_describe(key)}, dict key only support {_names(key_types)}")
        if not isinstance(item, value_types):
            raise TypeError(f"{name}[{key!r}]: {_describe(item)}, dict value only support {_names(value_types)}")


def _check_range(name: str, value: object, lowest: int, highest: int) -> None:
    check_isinstance(name, value, int, allow_none=False)
    if not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name}: {value}, value is out of range [{lowest}, {highest}]")


def check_uint8(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [0, 2**8 - 1]."""
    _check_range(name, value, 0, 2**8 - 1)


def check_uint16(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [0, 2**16 - 1]."""
    _check_range(name, value, 0, 2**16 - 1)


def check_uint32(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [0, 2**32 - 1]."""
    _check_range(name, value, 0, 2**32 - 1)


def check_uint64(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [0, 2**64 - 1]."""
    _check_range(name, value, 0, 2**64 - 1)


def check_int32(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [-2**31, 2**31 - 1]."""
    _check_range(name, value, -(2**31), 2**31 - 1)


def check_int64(name: str, value: object) -> None:
    """TypeError unless an int, ValueError "... value is out of range ..." outside [-2**63, 2**63 - 1]."""
    _check_range(name, value, -(2**63), 2**63 - 1)


def is_valid_layer_range(layers: range) -> bool:
    """Whether `layers` is consecutive, not empty and starts at 0 or above."""
    return layers.step == 1 and 0 <= layers.start < layers.stop


def ip_to_int(ip: str) -> int:
    """The bytes of an IPv4 address, read little-endian: what the API calls an int ip. RuntimeError if it is none."""
    try:
        return int.from_bytes(socket.inet_aton(ip), "little")
    except OSError:
        raise RuntimeError(f"Can not parse ip str: {ip!r}, allowed: an IPv4 address in dotted form") from None


def int_to_ip(ip: int) -> str:
    """The dotted form of an int ip."""
    return socket.inet_ntoa(ip.to_bytes(4, "little"))
