"""The command `vllm-datadist`."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

KEY_BYTES = 32


def make_key(path: Path) -> None:
    """Writes a new key file for the option `auth`, readable by this user only.

    Raises:
        FileExistsError: `path` exists: a key that is in use is never overwritten.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-datadist", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    key = commands.add_parser("key", help="make a key file for the option 'auth'")
    key.add_argument("file", type=Path, help="where to; must not exist yet. Copy it to every instance.")
    options = parser.parse_args(arguments)
    try:
        make_key(options.file)
    except OSError as error:
        print(f"vllm-datadist key: {options.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
