"""LoRA adapters: one name may mean two adapters, and one adapter may have two names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.checkpoints import make, write
from support.counting_keeper import CountingKeeper
from support.pd import BLOCK_SIZE, LOOPBACK, make_params, make_request, make_ticket
from vllm.lora.request import LoRARequest

from vllm_datadist_connector.kv_groups import KVGroup
from vllm_datadist_connector.protocol.digest import prompt_digest
from vllm_datadist_connector.scheduler.adapters import Adapters, is_same
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.side_channel.endpoint import Trust

PROMPT = list(range(3 * BLOCK_SIZE))


def make_adapter(folder: Path, seed: int = 1, **config: object) -> LoRARequest:
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", make(4, seed=seed))
    settings = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": str(folder), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(lora_name="a", lora_int_id=1, lora_path=str(folder))


def test_the_same_files_are_the_same_adapter(tmp_path: Path) -> None:
    one, other = make_adapter(tmp_path / "p"), make_adapter(tmp_path / "d")
    renamed = LoRARequest(lora_name="b", lora_int_id=7, lora_path=other.lora_path)
    adapters = Adapters()
    assert adapters.identity_of(one) == Adapters().identity_of(other)
    assert adapters.identity_of(one) != adapters.identity_of(renamed)
    assert is_same(adapters.identity_of(one), adapters.identity_of(renamed))


@pytest.mark.parametrize(("seed", "config"), [(2, {}), (1, {"r": 4}), (1, {"lora_alpha": 32})])
def test_one_name_of_two_adapters(tmp_path: Path, seed: int, config: dict[str, object]) -> None:
    one, other = make_adapter(tmp_path / "p"), make_adapter(tmp_path / "d", seed, **config)
    adapters = Adapters()
    assert not is_same(adapters.identity_of(one), adapters.identity_of(other))


def test_other_files_in_their_place(tmp_path: Path) -> None:
    adapters = Adapters()
    first = adapters.identity_of(make_adapter(tmp_path / "a"))
    lora = make_adapter(tmp_path / "a", seed=2)
    os.utime(tmp_path / "a" / "adapter_model.safetensors", ns=(1, 1))
    assert adapters.identity_of(lora) != first


def test_unknown_files_leave_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters = Adapters()
    gone = LoRARequest(lora_name="a@b", lora_int_id=1, lora_path=str(tmp_path / "absent"))
    assert adapters.identity_of(gone) == adapters.identity_of(gone) == "a@b@"
    assert len(caplog.records) == 1, "once for each"
    assert adapters.identity_of(None) == ""


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("", "", True),
        ("a@1", "a@1", True),
        ("a@1", "b@1", True),
        ("a@1", "a@2", False),
        ("a@", "a@1", True),
        ("a@1", "a@", True),
        ("a@", "b@1", False),
        ("a@", "b@", False),
        ("", "a@1", False),
        ("a@", "", False),
        ("", "@", False),
        ("@", "", False),
    ],
)
def test_comparison(ours: str, theirs: str, same: bool) -> None:
    assert is_same(ours, theirs) is is_same(theirs, ours) is same


def loadable(lora: LoRARequest | None, theirs: str, digest_of: str | None = None) -> int:
    """How many tokens D would take of a lease for PROMPT and P's adapter."""
    consumer = ConsumerScheduler((KVGroup(BLOCK_SIZE),), lambda host: host == LOOPBACK, 60.0, 5.0, Trust(), None)
    digest = prompt_digest(PROMPT, theirs if digest_of is None else digest_of)
    ticket = make_ticket(prompt_digest=digest, adapter=theirs)
    params = make_params(((1, 2, 3),), ticket=ticket, num_tokens=len(PROMPT))
    request = make_request(PROMPT, params, lora_request=lora)
    consumer.on_new_request(request)
    count = consumer.matched_tokens(request, 0)
    consumer.after_alloc(request, ([5, 6, 7],), 0)
    return count


def test_d_takes_blocks_of_its_own_adapter_only(
    tmp_path: Path, keeper: CountingKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    del keeper
    lora, other = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", seed=2)
    ours, theirs = (Adapters().identity_of(each) for each in (lora, other))
    all_but_the_last = len(PROMPT) - 1
    assert loadable(lora, ours) == all_but_the_last
    assert loadable(lora, "a@") == all_but_the_last
    assert loadable(None, "") == all_but_the_last
    assert not caplog.records
    assert [loadable(lora, theirs), loadable(None, ours), loadable(lora, "")] == [0, 0, 0]
    assert f"LoRA adapter: ours {ours}, that of P's request cmpl-p-0-00000000 at " in caplog.text
    assert theirs in caplog.text
    assert loadable(lora, ours, digest_of=theirs) == 0, "a ticket whose adapter a client has changed"
