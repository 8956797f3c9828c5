"""Spec and report: what is well-formed goes round unchanged, all else is refused with the field's name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vtpm.confine.report import (
    MAX_REPORT_BYTES,
    Protection,
    ProtectionStatus,
    decode_report,
    encode_failure,
    encode_report,
)
from vtpm.confine.spec import (
    MAX_SPEC_BYTES,
    ConfinementSpec,
    Limits,
    UserNamespace,
    decode_spec,
    encode_spec,
)
from vtpm.errors import ConfinementError

SPEC = ConfinementSpec(
    name="web1",
    uid=70001,
    gid=70002,
    target="vtpm.instance.main:prepare",
    import_paths=("/usr/lib/vtpm",),
    keep_fds=(3, 4),
    hold_fd=3,
    user_namespace=UserNamespace.HOST,
    limits=Limits(file_bytes=4096),
    target_args={"version": "2.0", "nested": {"list": [1, None]}},
)


def test_spec_is_the_same_when_encoded_and_decoded() -> None:
    assert decode_spec(encode_spec(SPEC)) == SPEC


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allow_list", "none"),
        ("allow_list", None),
        ("name", ""),
        ("name", "../x"),
        ("name", "a b"),
        ("name", "x" * 65),
        ("name", 1),
        ("uid", 0),
        ("uid", -1),
        ("uid", True),
        ("uid", 1 << 31),
        ("gid", 0),
        ("gid", "1"),
        ("target", "module"),
        ("target", "os.path:"),
        ("target", "a:b:c"),
        ("target", None),
        ("import_paths", []),
        ("import_paths", "/usr"),
        ("import_paths", ["src"]),
        ("import_paths", ["/usr/../etc"]),
        ("import_paths", ["//usr"]),
        ("import_paths", [3]),
        ("keep_fds", [2, 3]),
        ("keep_fds", [3, 3]),
        ("keep_fds", [3, 64]),
        ("keep_fds", [[3]]),
        ("hold_fd", 5),
        ("hold_fd", 3.0),
        ("hold_fd", None),
        ("user_namespace", "none"),
        ("user_namespace", []),
        ("limits", {}),
        ("limits", []),
        ("target_args", []),
        ("extra", 1),
    ],
)
def test_spec_is_refused_when_a_field_is_wrong(field: str, value: object) -> None:
    content = json.loads(encode_spec(SPEC)) | {field: value}
    with pytest.raises(ConfinementError, match=field):
        decode_spec(json.dumps(content).encode())


@pytest.mark.parametrize("field", list(json.loads(encode_spec(SPEC))))
def test_spec_is_refused_when_a_field_is_missing(field: str) -> None:
    content = json.loads(encode_spec(SPEC))
    del content[field]
    with pytest.raises(ConfinementError, match=f"lacks fields: {field}"):
        decode_spec(json.dumps(content).encode())


@pytest.mark.parametrize(
    "limits",
    [{"memory_bytes": 1}, {"memory_bytes": "1"}, {"file_bytes": -1}, {"open_files": 4}, {"open_files": 5000},
     {"processes": 0}, {"processes": False}],
)  # fmt: skip
def test_spec_is_refused_when_a_limit_is_out_of_range(limits: dict[str, Any]) -> None:
    (name,) = limits
    with pytest.raises(ConfinementError, match=rf"limits\.{name}"):
        replace(SPEC, limits=replace(Limits(), **limits))


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"\xff",
        b"[" * 20_000,
        b'{"name": NaN}',
        b'{"name": 1, "name": 2}',
        b" " * (MAX_SPEC_BYTES + 1),
    ],
)
def test_spec_is_refused_when_it_is_not_a_bounded_json_object(encoded: bytes) -> None:
    with pytest.raises(ConfinementError, match="confinement spec"):
        decode_spec(encoded)


@pytest.mark.parametrize("target_args", [{"x": b""}, {"x": float("nan")}, {"x": "y" * MAX_SPEC_BYTES}])
def test_spec_is_refused_when_it_cannot_be_sent(target_args: dict[str, Any]) -> None:
    with pytest.raises(ConfinementError, match="web1"):
        encode_spec(replace(SPEC, target_args=target_args))


def test_report_is_the_same_when_encoded_and_decoded() -> None:
    report = (Protection("root", ProtectionStatus.IN_FORCE, "none"), Protection("uid", ProtectionStatus.WEAKER, "x"))
    assert decode_report(encode_report(report)) == report


def test_failure_is_raised_when_a_step_failed() -> None:
    with pytest.raises(ConfinementError, match=r"step root\. Do this") as caught:
        decode_report(encode_failure(ConfinementError("step root", next_step="Do this")))
    assert caught.value.message == "step root"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"protections": []}',
        b'{"protections": [["root", "fine", "x"]]}',
        b'{"protections": [["root", [], "x"]]}',
        b'{"protections": [1]}',
        b'{"failure": 1, "next_step": ""}',
        b"[" * 10_000,
        b" " * (MAX_REPORT_BYTES + 1),
    ],
)
def test_report_is_refused_when_it_is_not_one(message: bytes) -> None:
    with pytest.raises(ConfinementError, match="an instance"):
        decode_report(message)
