"""The command `vllm-datadist`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from vllm_datadist_connector.config import ConfigError, check_before_start
from vllm_datadist_connector.plugin import NAME

KEY_BYTES = 32
DISTRIBUTION = "vllm-datadist-connector"
PLUGIN = "datadist"
"""Of vLLM's entry point for us, by which VLLM_PLUGINS knows us."""
ROLES = ("kv_producer", "kv_consumer", "kv_both")


def make_key(path: Path) -> None:
    """Writes a new key file for the option `auth`, readable by this user only.

    Raises:
        FileExistsError: `path` exists: a key that is in use is never overwritten.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")


def find_problems(kv_transfer_config: str | None) -> list[str]:
    """Why vLLM in this environment would not start with the connector, or without it; each with what to do."""
    problems = []
    if importlib.util.find_spec("vllm") is None:
        problems.append(f"vllm is not installed in {sys.prefix}, where we are: install both in one environment")
    plugins = entry_points(group="vllm.general_plugins")
    if not any(each.value.startswith(__package__) for each in plugins):
        problems.append(f"{DISTRIBUTION} is no plugin of vLLM here: install it with pip, not by PYTHONPATH")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        problems.append(
            f"VLLM_PLUGINS is {allowed!r}, and vLLM loads no other plugins: add {PLUGIN!r}, unset it, or give"
            f' "kv_connector_module_path": "{__package__}.connector"'
        )
    if kv_transfer_config is not None:
        problems += _problems_of(kv_transfer_config)
    return problems


def _problems_of(kv_transfer_config: str) -> list[str]:
    try:
        config = json.loads(kv_transfer_config)
    except ValueError as error:
        # What a shell makes of $(cat FILE) for a file that is not there: vLLM then starts without a connector.
        return ["--kv-transfer-config is empty" if not kv_transfer_config.strip() else f"--kv-transfer-config: {error}"]
    if not isinstance(config, dict):
        return ["--kv-transfer-config: not a JSON object"]
    problems = []
    if config.get("kv_connector") != NAME:
        problems.append(f"kv_connector: {config.get('kv_connector')!r}, not {NAME!r}")
    if config.get("kv_role") not in ROLES:
        problems.append(f"kv_role: {config.get('kv_role')!r}, allowed: {', '.join(ROLES)}")
    try:
        check_before_start(config.get("kv_connector_extra_config"))
    except (ConfigError, TypeError) as error:
        problems.append(str(error))
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="vllm-datadist", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    key = commands.add_parser("key", help="make a key file for the option 'auth'")
    key.add_argument("file", type=Path, help="where to; must not exist yet. Copy it to every instance.")
    check = commands.add_parser("check", help="say why vLLM would not find or not take the connector")
    check.add_argument("config", nargs="?", help="the JSON of vLLM's --kv-transfer-config")
    selftest = commands.add_parser("selftest", help="show what the provider does on this hardware, without a model")
    if given[:1] == ["selftest"]:
        # Not above: it loads the native library, without which `key` and `check` work.
        from vllm_datadist_connector.selftest import command

        command.add_arguments(selftest)
    options = parser.parse_args(given)
    if options.command == "selftest":
        return command.run(options, selftest.error)
    if options.command == "check":
        problems = find_problems(options.config)
        print("\n".join(problems) if problems else "vLLM finds the connector" + " and takes it" * bool(options.config))
        return int(bool(problems))
    try:
        make_key(options.file)
    except OSError as error:
        print(f"vllm-datadist key: {options.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
