"""The seccomp filter, run by an interpreter of its own: no kernel takes part."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from vtpm.confine import bpf
from vtpm.confine.bpf import BitsClear, Instruction, OneOf, Rule, assemble, pack
from vtpm.confine.policy import policy_of, rules_for
from vtpm.confine.spec import AllowList
from vtpm.confine.syscalls import AUDIT_ARCH, SYSCALLS, Machine
from vtpm.errors import ConfinementError

KILL, ALLOW, EPERM = bpf.RET_KILL_PROCESS, bpf.RET_ALLOW, bpf.RET_ERRNO | errno.EPERM
I386 = 0x40000003


def run(program: Sequence[Instruction], number: int, arguments: Sequence[int] = (), arch: int = 0xC000003E) -> int:
    """Interpret a filter over one struct seccomp_data, as the kernel would."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *(list(arguments) + [0] * 6)[:6])
    accumulator, at = 0, 0
    while True:
        step = program[at]
        at += 1
        if step.code == bpf.RETURN:
            return step.operand
        if step.code == bpf.LOAD_WORD:
            (accumulator,) = struct.unpack_from("<I", data, step.operand)
            continue
        holds = {
            bpf.JUMP_EQUAL: accumulator == step.operand,
            bpf.JUMP_GREATER_EQUAL: accumulator >= step.operand,
            bpf.JUMP_ANY_BIT: bool(accumulator & step.operand),
        }[step.code]
        at += step.jump_true if holds else step.jump_false


def policy(machine: Machine) -> tuple[Instruction, ...]:
    return assemble(machine, rules_for(machine, policy_of(AllowList.VTPMD)))


def number(name: str, machine: Machine) -> int:
    value = getattr(SYSCALLS[name], machine.value)
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("machine", Machine)
def test_only_listed_numbers_pass_when_all_are_tried(machine: Machine) -> None:
    program = policy(machine)
    listed = {n for numbers in SYSCALLS.values() if (n := getattr(numbers, machine.value)) is not None}
    for candidate in range(600):
        outcome = run(program, candidate, arch=AUDIT_ARCH[machine])
        assert candidate in listed or outcome == KILL, candidate


@pytest.mark.parametrize("machine", Machine)
def test_every_named_call_is_in_the_list_when_the_policy_is_read(machine: Machine) -> None:
    rules = rules_for(machine, policy_of(AllowList.VTPMD))
    assert set(rules) == {n for numbers in SYSCALLS.values() if (n := getattr(numbers, machine.value)) is not None}


@pytest.mark.parametrize("machine", Machine)
def test_relay_may_do_nothing_that_a_vtpmd_may_not_when_their_lists_are_compared(machine: Machine) -> None:
    relay, vtpmd = (rules_for(machine, policy_of(which)) for which in (AllowList.RELAY, AllowList.VTPMD))
    assert set(relay) < set(vtpmd)
    for called, rules in relay.items():
        # A condition of its own may be narrower, but none may be missing.
        assert all(
            bool(mine.conditions) >= bool(theirs.conditions) for mine, theirs in zip(rules, vtpmd[called], strict=False)
        )
        assert {rule.action for rule in rules} <= {rule.action for rule in vtpmd[called]}
    for name in ("clone", "epoll_ctl", "futex", "openat", "pwrite64", "socket"):
        called = getattr(SYSCALLS[name], machine.value) if name in SYSCALLS else None
        assert not any(rule.action == ALLOW for rule in relay.get(called, [])), name


@pytest.mark.parametrize("machine", Machine)
@pytest.mark.parametrize("arch", [I386, *AUDIT_ARCH.values(), 0])
def test_call_is_killed_when_its_architecture_is_another(machine: Machine, arch: int) -> None:
    outcome = run(policy(machine), number("read", machine), arch=arch)
    assert outcome == (ALLOW if arch == AUDIT_ARCH[machine] else KILL)


@pytest.mark.parametrize("name", ["read", "getpid"])
def test_call_is_killed_when_it_has_an_x32_number(name: str) -> None:
    assert run(policy(Machine.X86_64), number(name, Machine.X86_64)) == ALLOW
    assert run(policy(Machine.X86_64), 0x40000000 + number(name, Machine.X86_64)) == KILL


@pytest.mark.parametrize("machine", Machine)
@pytest.mark.parametrize(
    ("name", "arguments", "outcome"),
    [
        ("mmap", (0, 4096, 3, 0x22), ALLOW),
        ("mmap", (0, 4096, 4, 0x22), KILL),
        ("mmap", (0, 4096, 7, 0x22), KILL),
        ("mprotect", (0, 4096, 3), ALLOW),
        ("mprotect", (0, 4096, 5), KILL),
        ("mremap", (0, 1, 2, 1), ALLOW),
        ("mremap", (0, 1, 2, 3), KILL),
        ("ioctl", (0, 0x541B), ALLOW),
        ("ioctl", (0, 0x5421), ALLOW),
        ("ioctl", (0, 0x5401), bpf.RET_ERRNO | errno.ENOTTY),
        ("ioctl", (0, 0x5412), KILL),
        ("ioctl", (0, 0x541B | 1 << 32), KILL),
        ("fcntl", (0, 1030), ALLOW),
        ("fcntl", (0, 8), KILL),  # F_SETOWN: signals to others
        ("futex", (0, 0x80), ALLOW),
        ("futex", (0, 0x8C), KILL),  # FUTEX_CMP_REQUEUE_PI | PRIVATE
        ("madvise", (0, 0, 4), ALLOW),
        ("madvise", (0, 0, 100), KILL),
        ("tgkill", (1, 2, 6), ALLOW),
        ("tgkill", (1, 2, 9), KILL),
        ("tgkill", (2, 2, 6), KILL),
        ("openat", (), EPERM),
        ("newfstatat", (), EPERM),
    ],
)
def test_call_is_decided_by_its_arguments_when_it_has_conditions(
    machine: Machine, name: str, arguments: tuple[int, ...], outcome: int
) -> None:
    assert run(policy(machine), number(name, machine), arguments, AUDIT_ARCH[machine]) == outcome


def test_first_matching_rule_decides_when_a_call_has_several() -> None:
    rules = {7: [Rule(ALLOW, (OneOf(0, (1, 2, 3)), BitsClear(1, 8))), Rule(EPERM, (OneOf(0, (3,)),)), Rule(5)]}
    program = assemble(Machine.X86_64, rules)
    assert [run(program, 7, (value, 1)) for value in (1, 2, 3, 4)] == [ALLOW, ALLOW, ALLOW, 5]
    assert [run(program, 7, (value, 8)) for value in (1, 3)] == [5, EPERM]
    assert run(program, 8) == KILL


def test_instruction_is_eight_bytes_when_packed() -> None:
    assert pack([Instruction(0x15, 1, 2, 0x12345678)]) == struct.pack("=HBBI", 0x15, 1, 2, 0x12345678)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(ALLOW, (OneOf(6, (1,)),)),
        Rule(ALLOW, (OneOf(0, ()),)),
        Rule(ALLOW, (OneOf(0, (1 << 32,)),)),
        Rule(ALLOW, (BitsClear(-1, 1),)),
        Rule(ALLOW, (OneOf(0, tuple(range(300))),)),
    ],
)
def test_rule_is_refused_when_it_cannot_be_expressed(rule: Rule) -> None:
    with pytest.raises(ConfinementError):
        assemble(Machine.X86_64, {1: [rule]})


@pytest.mark.parametrize(
    "text",
    [
        "[allow",
        "[deny]\nread = 'x'",
        "[allow]\nraed = 'x'",
        "[allow]\nread = ''",
        "[allow]\nread = 3",
        "[allow]\nread = { why = 'x' }",
        "[allow]\nread = { why = 'x', when = [] }",
        "[allow]\nread = { why = 'x', when = [{ argument = 1 }] }",
        "[allow]\nread = { why = 'x', when = [{ argument = 1, one_of = ['a'] }] }",
        "[allow]\nread = { why = 'x', when = [{ argument = 1, one_of = [1], bits_clear = 1 }] }",
        "[errno.NOSUCH]\nread = 'x'",
        "[errno]\nEPERM = 'x'",
        "allow = 1",
    ],
)
def test_policy_is_refused_when_it_is_not_of_the_form(text: str) -> None:
    with pytest.raises(ConfinementError, match="seccomp"):
        rules_for(Machine.X86_64, text)


def _headers() -> dict[Machine, dict[str, int]]:
    (x86_64,) = Path("/usr/include").glob("*/asm/unistd_64.h")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    tables = {
        Machine.X86_64: {name: int(value) for name, value in pattern.findall(x86_64.read_text())},
        Machine.AARCH64: {
            name: int(value) for name, value in pattern.findall(Path("/usr/include/asm-generic/unistd.h").read_text())
        },
    }
    generic = tables[Machine.AARCH64]
    generic["newfstatat"] = generic["fstatat"]  # on 64-bit machines __NR3264_fstatat is newfstatat
    return tables


def test_numbers_are_the_kernel_headers_when_compared() -> None:
    headers = _headers()
    for machine, table in headers.items():
        ours = {name: getattr(numbers, machine.value) for name, numbers in SYSCALLS.items()}
        older = {"stat", "lstat"} if machine is Machine.AARCH64 else set()  # 32-bit only there
        assert ours == {name: None if name in older else table.get(name) for name in SYSCALLS}
