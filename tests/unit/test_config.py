"""kv_connector_extra_config: every key's default, limits and message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_datadist_connector.config import ConfigError, ConnectorConfig, Parallel, parse_config, with_time_limits

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS = {
    "host": "127.0.0.1",
    "side_channel_port": 0,
    "engine_port": 0,
    "transport": "auto",
    "transfer_threads": 2,
    "tcp_streams": 2,
    "huge_pages": True,
    "queue_threads": 4,
    "lease_s": 30.0,
    "claim_s": 10.0,
    "lease_limit_s": 600.0,
    "bidirectional": False,
    "role_switch": False,
    "decoder_lease_s": 480.0,
    "recompute_threshold": 64,
    "recv_deadline_s": 60.0,
    "handoff_wait_s": 30.0,
    "transfer_mode": "pull",
    "pull_timeout_s": 20.0,
    "handshake_timeout_s": 5.0,
    "link_timeout_s": 5.0,
    "peer_backoff_s": 1.0,
    "peer_ttl_s": 3600.0,
    "allowed_peers": [],
    "auth": "",
    "insecure": False,
    "verify": "off",
    "weights_id": "",
    "may_differ": [],
    "provider": "auto",
    "local_comm_res": "",
    "ascend_local_comm_res_path": "",
    "prefill": None,
    "decode": None,
    "use_ascend_direct": False,
}

ALLOWED: dict[str, list[object]] = {
    "host": ["127.0.0.2", "::1"],
    "side_channel_port": [0, 65535],
    "engine_port": [0, 65535],
    "transport": ["auto", "local", "cma", "tcp"],
    "transfer_mode": ["pull", "push"],
    "transfer_threads": [1, 64],
    "tcp_streams": [1, 16],
    "huge_pages": [True, False],
    "queue_threads": [1, 64],
    "lease_s": [1, 600],
    "claim_s": [1, 600],
    "lease_limit_s": [60, 86400],
    "bidirectional": [True, False],
    "role_switch": [True, False],
    "decoder_lease_s": [1, 3600],
    "recompute_threshold": [0, 2**31],
    "recv_deadline_s": [20, 600],
    "handoff_wait_s": [0.1, 86400],
    "pull_timeout_s": [0.1, 60],
    "handshake_timeout_s": [0.001, 60],
    "link_timeout_s": [0.001, 60],
    "peer_backoff_s": [0.001, 60],
    "peer_ttl_s": [0.001, 86400],
    "allowed_peers": [[], ["10.0.0.0/8", "::1", "192.168.1.7"]],
    "auth": ["/run/secrets/datadist"],
    "insecure": [True, False],
    "verify": ["off", "log", "fail"],
    "weights_id": ["", "release 7"],
    "may_differ": [[], ["weights", "model", "rope_parameters.rope_theta"]],
    "provider": ["auto", "engine", "cann"],
    "local_comm_res": ["", "/etc/npu_{device}.json", '{"version": "1.3"}'],
    "ascend_local_comm_res_path": ["", "/etc/ub"],
    "prefill": [None],
    "decode": [None],
    "use_ascend_direct": [True, False],
}

REFUSED: dict[str, list[object]] = {
    "host": ["0.0.0.0", "::", "localhost", "", "224.0.0.1", "127.0.0.1:5", 5, None],  # noqa: S104
    "side_channel_port": [-1, 65536, "80", 1.5, True],
    "engine_port": [-1, 65536, None],
    "transfer_mode": ["", "write", True, None],
    "transport": ["rdma", "", None, 1],
    "transfer_threads": [0, 65, 1.5],
    "tcp_streams": [0, 17],
    "huge_pages": [1, "yes", None],
    "queue_threads": [0, 65],
    "lease_s": [0.5, 3601, "30", float("nan")],
    "claim_s": [0.5, 3601],
    "lease_limit_s": [0, 86401],
    "bidirectional": [1, "true", None],
    "role_switch": [1, "true", None],
    "decoder_lease_s": [0.5, 3601, "480", float("nan")],
    "recompute_threshold": [-1, 2**31 + 1, 1.5, True, None],
    "recv_deadline_s": [0, -1, 86401],
    "handoff_wait_s": [0, -1, 86401],
    "pull_timeout_s": [0.05, 3601],
    "handshake_timeout_s": [0, 86401],
    "link_timeout_s": [0, 86401],
    "peer_backoff_s": [0, 86401],
    "peer_ttl_s": [0, 86401],
    "allowed_peers": ["10.0.0.1", ["prefill.example"], [5], ["10.0.0.0/40"], ["10.0.0.1"] * 257],
    "auth": [5, None, "x" * 4097],
    "insecure": [1, "true", None],
    "verify": ["on", True, None],
    "weights_id": [7, None, "x" * 201],
    "may_differ": ["weights", ["kv_cache_dtype"], ["weights", "kv_packing"], [5], ["x"] * 257],
    "provider": ["hixl", "", None],
    "local_comm_res": [{"version": "1.0"}, None, "x" * 65537],
    "ascend_local_comm_res_path": [5, None, "x" * 4097],
    "prefill": [8, [], {"tp_size": 0}, {"dp_size": "1"}],
    "decode": [8, [], {"tp_size": 0}, {"dp_size": "1"}],
    "use_ascend_direct": [1, "true", None],
}


def _cases(table: dict[str, list[object]]) -> list[tuple[str, object]]:
    return [(key, value) for key, values in table.items() for value in values]


def test_tables_cover_every_key() -> None:
    assert set(DEFAULTS) == set(ALLOWED) == set(REFUSED) == set(ConnectorConfig.__struct_fields__)


@pytest.mark.parametrize("extra", [None, {}])
def test_defaults(extra: dict[str, object] | None) -> None:
    config = parse_config(extra)
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("key", "value"), _cases(ALLOWED))
def test_allowed(key: str, value: object) -> None:
    assert getattr(parse_config({key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), _cases(REFUSED))
def test_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({key: value})


@pytest.mark.parametrize("value", [99999, "x"])
def test_refusal_names_value_and_limits(value: object) -> None:
    with pytest.raises(ConfigError, match=rf"side_channel_port.*{value!r}"):
        parse_config({"side_channel_port": value})


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("transport", "rdma", "transport: 'rdma', allowed: 'auto', 'cma', 'local', 'tcp'"),
        ("huge_pages", 1, "huge_pages: 1, allowed: true, false"),
        ("transfer_threads", 65, "transfer_threads: 65, allowed: whole numbers from 1 to 64"),
        ("lease_s", "30", "lease_s: '30', allowed: numbers from 1.0 to 3600"),
        ("peer_ttl_s", 0, "peer_ttl_s: 0, allowed: numbers above 0 up to 86400"),
        ("allowed_peers", "::1", "allowed_peers: '::1', allowed: a list of at most 256 texts"),
        ("may_differ", [5], "may_differ: [5], allowed: a list of at most 256 texts"),
        ("auth", 5, "auth: 5, allowed: a text of at most 4096 characters"),
        ("host", 5, "host: 5, allowed: a text"),
    ],
)
def test_refusal_lists_what_is_allowed(key: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^kv_connector_extra_config: {re.escape(told)}$"):
        parse_config({key: value})


WITHIN = [
    ("pull_timeout_s", "recv_deadline_s"),
    ("handshake_timeout_s", "recv_deadline_s"),
    ("link_timeout_s", "recv_deadline_s"),
    ("peer_backoff_s", "recv_deadline_s"),
    ("recv_deadline_s", "lease_limit_s"),
    ("lease_s", "lease_limit_s"),
    ("decoder_lease_s", "lease_limit_s"),
]


@pytest.mark.parametrize(("inner", "outer"), WITHIN)
def test_a_time_limit_that_another_cuts_short_is_refused_by_both_names(inner: str, outer: str) -> None:
    short = dict.fromkeys(("pull_timeout_s", "handshake_timeout_s", "link_timeout_s", "peer_backoff_s"), 1)
    roomy = {**short, "lease_s": 1, "decoder_lease_s": 1, "recv_deadline_s": 100, "bidirectional": True}
    limits = {**roomy, "lease_limit_s": 100, outer: 100}
    assert getattr(parse_config({**limits, inner: 100}), inner) == 100
    with pytest.raises(ConfigError, match=rf"^{inner}: 101.* is above {outer} \(100"):
        parse_config({**limits, inner: 101})


def test_a_time_limit_that_is_not_given_follows_the_one_around_it() -> None:
    config = parse_config({"recv_deadline_s": 2})
    assert (config.pull_timeout_s, config.link_timeout_s, config.lease_s) == (2, 2, 30)
    config = parse_config({"lease_limit_s": 10, "lease_s": 5})
    assert (config.recv_deadline_s, config.pull_timeout_s, config.lease_s) == (10, 10, 5)


def test_a_lease_of_turns_that_are_not_kept_has_no_limit() -> None:
    assert parse_config({"decoder_lease_s": 3600}).decoder_lease_s == 3600


def test_time_limits_of_a_provider_replace_defaults_only_and_stay_within_what_is_around_them() -> None:
    defaults = {"link_timeout_s": 90.0, "pull_timeout_s": 33.0}

    def limits(**given: object) -> tuple[float, float]:
        config = with_time_limits(parse_config(given), given, defaults)
        return config.link_timeout_s, config.pull_timeout_s

    assert limits() == (60, 33)
    assert limits(recv_deadline_s=20) == (20, 20)
    assert limits(recv_deadline_s=500) == (90, 33)
    assert limits(pull_timeout_s=20) == (60, 20), "the default, but given"


def test_keys_of_ascend_recipes() -> None:
    """As they stand there, with what else they say of either side."""
    config = parse_config(
        {
            "prefill": {"dp_size": 2, "tp_size": 8, "pp_size": 1},
            "decode": {"dp_size": 32, "tp_size": 1},
            "use_ascend_direct": True,
            "ascend_local_comm_res_path": "/etc/ub",
        }
    )
    assert config.prefill == Parallel(tp_size=8, dp_size=2)
    assert config.decode == Parallel(tp_size=1, dp_size=32)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (8, "prefill: 8, allowed: an object such as {'tp_size': 8, 'dp_size': 1}"),
        ({"tp_size": 0}, "Expected `int` >= 1 - at `$.prefill.tp_size`"),
    ],
)
def test_a_part_of_a_recipe_that_is_wrong_is_named(value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config({"prefill": value})


def test_one_source_of_addresses() -> None:
    with pytest.raises(ConfigError, match=r"^local_comm_res and ascend_local_comm_res_path exclude each other"):
        parse_config({"local_comm_res": "{}", "ascend_local_comm_res_path": "/etc/ub"})


def test_unknown_key_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'lease_seconds'; did you mean 'lease_s'"):
        parse_config({"lease_seconds": 5})
    with pytest.raises(ConfigError, match="'zzz'; known keys: host, "):
        parse_config({"zzz": 5})


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.5", True),
        ("fd00:0:0:0:0:0:0:5", True),
        ("192.168.3.4", True),
        ("192.169.3.4", False),
        ("localhost", False),
        ("::1%eth0", False),
        ("10.0.0.5\0", False),
        ("0.0.0.0", False),  # noqa: S104
        ("", False),
    ],
)
def test_allows_peer(host: str, allowed: bool) -> None:
    config = parse_config({"host": "10.0.0.5", "insecure": True, "allowed_peers": ["192.168.0.0/16", "fd00::5"]})
    assert config.allows_peer(host) is allowed


KEY = {"auth": "/run/secrets/datadist"}


@pytest.mark.parametrize("host", ["10.1.2.3", "fd00::5"])
def test_a_host_that_others_reach_needs_a_key_or_leave(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"host: '{host}' can be reached by other hosts"):
        parse_config({"host": host})
    for trust in (KEY, {"insecure": True}):
        assert parse_config({"host": host, **trust}).host == host


def test_a_key_and_insecure_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="auth and insecure exclude each other"):
        parse_config({**KEY, "insecure": True})


def test_trust_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_INSECURE", "1")
    assert parse_config({}).insecure
    assert parse_config(KEY).auth == KEY["auth"], "what the configuration says goes first"
    monkeypatch.setenv("DATADIST_INSECURE", "0")
    monkeypatch.setenv("DATADIST_AUTH_KEY_FILE", "/run/secrets/other")
    assert parse_config({}).auth == "/run/secrets/other"
    monkeypatch.setenv("DATADIST_INSECURE", "yes")
    with pytest.raises(ConfigError, match="DATADIST_INSECURE: 'yes', allowed: 0, 1"):
        parse_config({})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs(path: Path) -> None:
    transfer = json.loads(path.read_text())
    assert transfer["kv_connector"] == "DataDistConnector"
    assert transfer["kv_role"] in ("kv_producer", "kv_consumer", "kv_both")
    parse_config(transfer.get("kv_connector_extra_config"))


def test_networks_are_not_parsed_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"allowed_peers": [f"10.{index}.0.0/16" for index in range(256)]})
    assert config.allows_peer("10.255.1.2")
    parsed: list[object] = []
    monkeypatch.setattr("ipaddress.ip_network", lambda *values, **_: parsed.append(values))
    assert config.allows_peer("10.7.1.2")
    assert not config.allows_peer("11.7.1.2")
    assert not parsed
