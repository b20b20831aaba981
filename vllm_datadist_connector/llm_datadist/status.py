"""Status codes and the exception that carries them."""

from __future__ import annotations

from typing import Final

from vllm_datadist_connector.llm_datadist.utils.utils import NamedIntEnum, ValueObject

_BASE: Final = 0x5010B000


class LLMStatusCode(NamedIntEnum):
    """What a call came to. Values are those of the C++ API (LLM-DataDist Python: LLMStatusCode)."""

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF
    LLM_PARAM_INVALID = _BASE + 0x05
    LLM_WAIT_PROCESS_TIMEOUT = _BASE + 0x01
    LLM_KV_CACHE_NOT_EXIST = _BASE + 0x02
    LLM_REPEAT_REQUEST = _BASE + 0x03
    LLM_REQUEST_ALREADY_COMPLETED = _BASE + 0x04
    LLM_ENGINE_FINALIZED = _BASE + 0x06
    LLM_NOT_YET_LINK = _BASE + 0x07
    LLM_ALREADY_LINK = _BASE + 0x08
    LLM_LINK_FAILED = _BASE + 0x09
    LLM_UNLINK_FAILED = _BASE + 0x0A
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = _BASE + 0x0B
    LLM_CLUSTER_NUM_EXCEED_LIMIT = _BASE + 0x0C
    LLM_PROCESSING_LINK = _BASE + 0x0D
    LLM_DEVICE_OUT_OF_MEMORY = _BASE + 0x0E
    LLM_PREFIX_ALREADY_EXIST = _BASE + 0x0F
    LLM_PREFIX_NOT_EXIST = _BASE + 0x10
    LLM_SEQ_LENOVERLIMIT = _BASE + 0x11
    LLM_NO_FREE_BLOCK = _BASE + 0x12
    LLM_BLOCKS_OUT_OF_MEMORY = _BASE + 0x13
    LLM_EXIST_LINK = _BASE + 0x18
    LLM_FEATURE_NOT_ENABLED = _BASE + 0x19
    LLM_TIMEOUT = _BASE + 0x1A
    LLM_LINK_BUSY = _BASE + 0x1B
    LLM_OUT_OF_MEMORY = _BASE + 0x1C
    LLM_DEVICE_MEM_ERROR = 507053
    LLM_SUSPECT_REMOTE_ERROR = 507057
    LLM_UNKNOWN_ERROR = -1


class LLMException(RuntimeError):  # noqa: N818 - the documented name
    """A call failed: `status_code` says how, the text names the field, its value and what is allowed, or the peer.

    LLM-DataDist Python: LLMException.
    """

    def __init__(self, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS) -> None:
        super().__init__(*args)
        self._status_code = status_code

    @property
    def status_code(self) -> LLMStatusCode:
        return self._status_code


class Status(ValueObject):
    """A status code as an object (LLM-DataDist Python: Status)."""

    def __init__(self, status: LLMStatusCode) -> None:
        self._status_code = status

    def is_ok(self) -> bool:
        return self._status_code == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        return self._status_code

    def _fields(self) -> tuple[object, ...]:
        return (self._status_code,)

    def __repr__(self) -> str:
        return f"Status({self._status_code})"


def to_status_code(native: int) -> LLMStatusCode:
    """The enumerator of a native status word; LLM_FAILED for one that the API does not name."""
    try:
        return LLMStatusCode(native)
    except ValueError:
        return LLMStatusCode.LLM_FAILED


def failure(status_code: LLMStatusCode, reason: str) -> LLMException:
    """The LLMException for what is refused before the engine is asked; says the code by name and number as well."""
    return LLMException(f"{reason}, error code is {status_code} (0x{status_code:08X})", status_code=status_code)


def param_invalid(name: str, value: object, allowed: str) -> LLMException:
    """The LLMException (LLM_PARAM_INVALID) for a value that has the right type and is still not allowed."""
    return failure(LLMStatusCode.LLM_PARAM_INVALID, f"{name}: {value!r}, allowed: {allowed}")


def raise_on_failure(native_status: int, call: str, info: str = "") -> None:
    """LLMException unless `native_status` is success, with the engine's own reason for this thread's last failure."""
    if native_status == LLMStatusCode.LLM_SUCCESS:
        return
    from vllm_datadist_connector import _native

    status_code = to_status_code(native_status)
    details = ", ".join(part for part in (_native.last_error(), info) if part)
    raise LLMException(
        f"[{call}] failed, error code is {status_code} (0x{native_status:08X}), {details or 'no reason given'}",
        status_code=status_code,
    )
