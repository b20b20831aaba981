"""The engine's frames, written from their description (native/src/control/frame.h) and not with its code."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

VERSION = 9
CHANNEL, CHANNEL_READY = 23, 24
RENEW, RENEWED, RELEASE, RELEASED = 27, 28, 31, 32

_HEADER = struct.Struct("<4sHHIII")
_MAGIC = b"DDDK"


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_TABLE = _crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


class Frame(NamedTuple):
    kind: int
    seq: int
    body: bytes


def encode(frame: Frame) -> bytes:
    fields = (_MAGIC, VERSION, frame.kind, len(frame.body), frame.seq)
    crc = _crc32c(_HEADER.pack(*fields, 0) + frame.body)
    return _HEADER.pack(*fields, crc) + frame.body


def receive(stream: socket.socket) -> Frame | None:
    """None at the end of the connection. Whatever else is wrong fails the test."""
    header = stream.recv(_HEADER.size, socket.MSG_WAITALL)
    if len(header) < _HEADER.size:
        return None
    magic, version, kind, size, seq, crc = _HEADER.unpack(header)
    body = stream.recv(size, socket.MSG_WAITALL) if size else b""
    assert (magic, version, len(body)) == (_MAGIC, VERSION, size)
    assert _crc32c(header[:-4] + bytes(4) + body) == crc
    return Frame(kind, seq, body)


def pack_tokens(tokens: tuple[str, ...]) -> bytes:
    return struct.pack("<I", len(tokens)) + b"".join(map(bytes.fromhex, tokens))


def unpack_tokens(body: bytes) -> tuple[str, ...]:
    assert len(body) == 4 + 16 * int.from_bytes(body[:4], "little")
    return tuple(body[start : start + 16].hex() for start in range(4, len(body), 16))


def unpack_renewal(body: bytes) -> tuple[tuple[str, ...], bool]:
    """(tokens, whether they are being pulled)"""
    return unpack_tokens(body[:-1]), {b"\0": False, b"\1": True}[body[-1:]]
