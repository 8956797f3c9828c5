"""Answered means durable: under kill -9, failing flushes, a full disk and failing writes. Real ones, nothing mocked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtpm

ROOT = Path(__file__).parents[3]
SOURCES = Path(vtpm.__file__).parents[1]
LIMIT_S = 50
KILLS = 200


def run(*arguments: str | Path, prefix: tuple[str | Path, ...] = ()) -> str:
    command = [*prefix, sys.executable, "-m", "tests.fault.vault.programs", *arguments]
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{SOURCES}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_answered_save_is_stored_when_killed_at_random_moments(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    result = json.loads(run("kill_rounds", tmp_path / "vault", str(KILLS), str(seed)))
    # Otherwise nothing was tried.
    assert result["rounds_with_acknowledgement"] > KILLS // 3
    assert result["acknowledged"] > KILLS


def unflushed_acknowledgements(trace: str) -> list[int]:
    """Numbers of the saves for which the log was not flushed between its last write and the acknowledgement."""
    flush = re.compile(r"(fsync|fdatasync)\(\d+<[^>]*vtpm\.db-wal>")
    unfinished: dict[str, bool] = {}
    dirty, flushed, unflushed = False, False, []
    for line in trace.splitlines():
        process, _, call = line.partition(" ")
        call = call.strip()
        if "begin " in call and call.startswith("write(1<"):
            dirty = flushed = False
        elif re.match(r"(pwrite64|write)\(\d+<[^>]*vtpm\.db-wal>", call):
            dirty, flushed = True, False
        elif flush.match(call):
            if call.endswith("<unfinished ...>"):
                unfinished[process] = True
            else:
                flushed = call.endswith("= 0")
        elif re.match(r"<\.\.\. (fsync|fdatasync) resumed>", call) and unfinished.pop(process, False):
            flushed = call.endswith("= 0")
        elif (ack := re.match(r'write\(1<[^>]*>, "ack (\d+)', call)) and not (dirty and flushed):
            unflushed.append(int(ack[1]))
    return unflushed


def traced(tmp_path: Path, synchronous: str) -> tuple[str, str]:
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write,pwrite64", "-o", trace)
    output = run("write_some", tmp_path / "vault", "20", synchronous, prefix=prefix)
    return output, trace.read_text()


def test_log_is_flushed_before_each_acknowledgement_when_traced(tmp_path: Path) -> None:
    output, trace = traced(tmp_path, "as shipped")
    assert output.count("ack ") == 20
    assert unflushed_acknowledgements(trace) == []


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL"])
def test_trace_shows_it_when_synchronous_mode_is_weakened(tmp_path: Path, synchronous: str) -> None:
    """The mutation that the test before must notice."""
    output, trace = traced(tmp_path, synchronous)
    assert output.count("ack ") == 20
    assert unflushed_acknowledgements(trace) == list(range(1, 21))


def test_file_and_both_directories_are_flushed_in_order_when_store_is_made(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    names = "mkdir,link,linkat,unlink,unlinkat,fsync,fdatasync"
    run("write_some", tmp_path / "vault", "1", "as shipped", prefix=("strace", "-f", "-y", "-e", names, "-o", trace))
    calls = trace.read_text().replace(str(tmp_path), "T")
    steps = (
        r'mkdir\("T/vault", 0700\)',
        r"fsync\(\d+<T/vault/vtpm\.db\.new>\)",
        r'link(at)?\(.*"T/vault/vtpm\.db"',
        r"fsync\(\d+<T/vault>\)",
        r"fsync\(\d+<T>\)",
        r'unlink(at)?\(.*"T/vault/vtpm\.db\.new"',
        r"fdatasync\(\d+<T/vault/vtpm\.db-wal>\)",
    )
    position = 0
    for step in steps:
        found = re.search(rf"{step}.*= 0$", calls[position:], re.MULTILINE)
        assert found is not None, (step, calls)
        position += found.end()


def failing_flushes(tmp_path: Path, *faults: str) -> tuple[list[str], str]:
    """Save five times while strace makes flushes of the log fail with EIO; returns the answers and all output."""
    run("write_some", tmp_path / "vault", "1", "as shipped")
    prefix = ["strace", "-f", "-o", tmp_path / "trace", "-P", tmp_path / "vault" / "vtpm.db-wal"]
    for fault in faults:
        prefix += ["-e", f"inject={fault}"]
    output = run("write_some", tmp_path / "vault", "5", "as shipped", prefix=tuple(prefix))
    assert "INJECTED" in (tmp_path / "trace").read_text()
    return re.findall(r"^(ack|failed) \d", output, re.MULTILINE), output


def test_nothing_is_acknowledged_when_every_flush_fails(tmp_path: Path) -> None:
    # SQLite's fdatasync serves binding and loading first; fsync is what follows when the log is written again.
    answers, output = failing_flushes(tmp_path, "fdatasync:error=EIO:when=6+", "fsync:error=EIO")
    assert answers == ["ack"] * answers.index("failed") + ["failed"] * (5 - answers.index("failed"))
    assert "SQLITE_IOERR_FSYNC" in output or "Input/output error" in output


def test_acknowledged_only_after_the_log_was_written_again_when_flushes_of_commits_fail(tmp_path: Path) -> None:
    answers, _ = failing_flushes(tmp_path, "fdatasync:error=EIO:when=6+")
    assert answers == ["ack"] * 5
    calls = re.findall(r"(pwrite64|fdatasync|fsync)\(.*= (-1 EIO|\d+)", (tmp_path / "trace").read_text())
    first_failure = calls.index(("fdatasync", "-1 EIO"))
    later = [call for call, result in calls[first_failure:] if result != "-1 EIO"]
    assert "fsync" in later
    assert later[later.index("fsync") - 1] == "pwrite64"


def test_save_is_acknowledged_after_a_retry_when_one_flush_fails(tmp_path: Path) -> None:
    answers, _ = failing_flushes(tmp_path, "fdatasync:error=EIO:when=6")
    assert answers == ["ack"] * 5


def test_save_waits_for_space_and_else_fails_when_disk_is_full(tmp_path: Path) -> None:
    result = json.loads(run("fill_disk", tmp_path, prefix=("unshare", "--mount")))
    assert re.match(r"StoreError .*(full|SQLITE_FULL)", result["outcome"])
    assert 0.5 <= result["failed_after_s"] < 3
    assert 0.2 <= result["succeeded_after_s"] < 5
    assert result["stored"] == 3


def test_save_waits_for_the_device_and_else_fails_when_writes_fail(tmp_path: Path) -> None:
    result = json.loads(run("limit_file_size", tmp_path / "vault"))
    assert re.match(r"StoreError .*(SQLITE_IOERR|SQLITE_FULL|File too large)", result["outcome"])
    assert result["stored"] == 3
