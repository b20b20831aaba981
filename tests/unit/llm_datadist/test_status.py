"""Codes, the exception that carries them, and how a native status word becomes one."""

from __future__ import annotations

import pytest

from vllm_datadist_connector import _native
from vllm_datadist_connector.llm_datadist.status import (
    LLMException,
    LLMStatusCode,
    Status,
    failure,
    param_invalid,
    raise_on_failure,
    to_status_code,
)

DOCUMENTED = {
    "LLM_SUCCESS": 0x0,
    "LLM_FAILED": 0xFFFFFFFF,
    "LLM_WAIT_PROCESS_TIMEOUT": 0x5010B001,
    "LLM_KV_CACHE_NOT_EXIST": 0x5010B002,
    "LLM_REPEAT_REQUEST": 0x5010B003,
    "LLM_REQUEST_ALREADY_COMPLETED": 0x5010B004,
    "LLM_PARAM_INVALID": 0x5010B005,
    "LLM_ENGINE_FINALIZED": 0x5010B006,
    "LLM_NOT_YET_LINK": 0x5010B007,
    "LLM_ALREADY_LINK": 0x5010B008,
    "LLM_LINK_FAILED": 0x5010B009,
    "LLM_UNLINK_FAILED": 0x5010B00A,
    "LLM_NOTIFY_PROMPT_UNLINK_FAILED": 0x5010B00B,
    "LLM_CLUSTER_NUM_EXCEED_LIMIT": 0x5010B00C,
    "LLM_PROCESSING_LINK": 0x5010B00D,
    "LLM_DEVICE_OUT_OF_MEMORY": 0x5010B00E,
    "LLM_PREFIX_ALREADY_EXIST": 0x5010B00F,
    "LLM_PREFIX_NOT_EXIST": 0x5010B010,
    "LLM_SEQ_LENOVERLIMIT": 0x5010B011,
    "LLM_NO_FREE_BLOCK": 0x5010B012,
    "LLM_BLOCKS_OUT_OF_MEMORY": 0x5010B013,
    "LLM_EXIST_LINK": 0x5010B018,
    "LLM_FEATURE_NOT_ENABLED": 0x5010B019,
    "LLM_TIMEOUT": 0x5010B01A,
    "LLM_LINK_BUSY": 0x5010B01B,
    "LLM_OUT_OF_MEMORY": 0x5010B01C,
    "LLM_DEVICE_MEM_ERROR": 507053,
    "LLM_SUSPECT_REMOTE_ERROR": 507057,
    "LLM_UNKNOWN_ERROR": -1,
}


def test_codes() -> None:
    assert {code.name: code.value for code in LLMStatusCode} == DOCUMENTED


def test_codes_are_the_native_ones() -> None:
    native = {name for name in vars(_native) if name.startswith("LLM_")} - {"LLM_WAIT_PROC_TIMEOUT"}
    assert {name: getattr(_native, name) for name in native} == {name: DOCUMENTED[name] for name in native}
    assert _native.LLM_WAIT_PROC_TIMEOUT == LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT


def test_text_of_a_code() -> None:
    code = LLMStatusCode.LLM_TIMEOUT
    assert str(code) == f"{code}" == "LLMStatusCode.LLM_TIMEOUT"
    assert f"{code:08X}" == "5010B01A"


@pytest.mark.parametrize("code", LLMStatusCode)
def test_a_native_status_word_becomes_its_code(code: LLMStatusCode) -> None:
    assert to_status_code(int(code)) is code


@pytest.mark.parametrize("native", [0x5010B014, 0x5010B01D, 1, 0xFFFFFFFE])
def test_an_unknown_status_word_becomes_failed(native: int) -> None:
    assert to_status_code(native) is LLMStatusCode.LLM_FAILED


def test_exception() -> None:
    error = LLMException("text", 3, status_code=LLMStatusCode.LLM_LINK_BUSY)
    assert isinstance(error, RuntimeError)
    assert error.args == ("text", 3)
    assert error.status_code is LLMStatusCode.LLM_LINK_BUSY
    assert LLMException().status_code is LLMStatusCode.LLM_SUCCESS
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_FAILED  # type: ignore[misc]


def test_param_invalid_names_field_value_and_what_is_allowed() -> None:
    error = param_invalid("size", -2, "-1 or above 0")
    assert str(error) == (
        "size: -2, allowed: -1 or above 0, error code is LLMStatusCode.LLM_PARAM_INVALID (0x5010B005)"
    )
    assert error.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_failure_has_the_code_it_names() -> None:
    error = failure(LLMStatusCode.LLM_FAILED, "Cannot do it")
    assert str(error) == "Cannot do it, error code is LLMStatusCode.LLM_FAILED (0xFFFFFFFF)"
    assert error.status_code is LLMStatusCode.LLM_FAILED


def test_status() -> None:
    assert Status(LLMStatusCode.LLM_SUCCESS).is_ok()
    failed = Status(LLMStatusCode.LLM_FAILED)
    assert not failed.is_ok()
    assert failed.status_code is LLMStatusCode.LLM_FAILED
    assert repr(failed) == "Status(LLMStatusCode.LLM_FAILED)"


def test_success_does_not_raise() -> None:
    raise_on_failure(0, "call")


def test_failure_says_call_code_and_the_engine_s_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "last_error", lambda: "llm.DeviceId: missing")
    with pytest.raises(LLMException) as caught:
        raise_on_failure(0x5010B005, "init", "cluster 7")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert str(caught.value) == (
        "[init] failed, error code is LLMStatusCode.LLM_PARAM_INVALID (0x5010B005), llm.DeviceId: missing, cluster 7"
    )


def test_failure_with_an_unknown_code_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "last_error", lambda: "")
    with pytest.raises(LLMException) as caught:
        raise_on_failure(0x5010B017, "copy_cache")
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert str(caught.value) == (
        "[copy_cache] failed, error code is LLMStatusCode.LLM_FAILED (0x5010B017), no reason given"
    )
