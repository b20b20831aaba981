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
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="vllm-datadist", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    key = commands.add_parser("key", help="make a key file for the option 'auth'")
    key.add_argument("file", type=Path, help="where to; must not exist yet. Copy it to every instance.")
    doctor = commands.add_parser("doctor", help="say what will work here, what will be wrong, and what to do")
    selftest = commands.add_parser("selftest", help="show what the provider does on this hardware, without a model")
    role = commands.add_parser("role", help="change what running instances do: prefill for others, decode, or both")
    # Imported by who asks for it: the selftest loads the native library, whose absence the doctor is to tell.
    if given[:1] == ["doctor"]:
        from vllm_datadist_connector.doctor import command as doctor_command

        doctor_command.add_arguments(doctor)
    if given[:1] == ["selftest"]:
        from vllm_datadist_connector.selftest import command as selftest_command

        selftest_command.add_arguments(selftest)
    if given[:1] == ["role"]:
        from vllm_datadist_connector import role as role_command

        role_command.add_arguments(role)
    options = parser.parse_args(given)
    if options.command == "role":
        return role_command.run(options)
    if options.command == "doctor":
        return doctor_command.run(options)
    if options.command == "selftest":
        return selftest_command.run(options, selftest.error)
    try:
        make_key(options.file)
    except OSError as error:
        print(f"vllm-datadist key: {options.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
