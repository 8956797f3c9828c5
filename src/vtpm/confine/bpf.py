"""Assembles a seccomp filter from rules: classic BPF, as seccomp(2) takes it.

Pure; for `policy` and `steps`. It knows nothing of the kernel that will run the program, so programs are
tested by interpreting them. Three checks come before any rule: the audit architecture must be the machine's
own (a 32-bit entry has other numbers), x32 numbers are killed, and whatever no rule matches is killed.

Source: Linux Documentation/userspace-api/seccomp_filter.rst, uapi linux/filter.h, linux/bpf_common.h,
linux/seccomp.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vtpm.confine.syscalls import AUDIT_ARCH, X32_SYSCALL_BIT, Machine
from vtpm.errors import ConfinementError

RET_KILL_PROCESS = 0x80000000
RET_ERRNO = 0x00050000
RET_ALLOW = 0x7FFF0000

LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_GREATER_EQUAL = 0x35  # BPF_JMP | BPF_JGE | BPF_K
JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

OFFSET_NUMBER = 0
OFFSET_ARCH = 4
OFFSET_ARGUMENTS = 16
MAX_ARGUMENT = 5
MAX_INSTRUCTIONS = 4096
MAX_JUMP = 255


@dataclass(frozen=True)
class OneOf:
    """Argument `argument` (0 to 5), all 64 bits of it, is one of `values` (each 0 to 2**32 - 1)."""

    argument: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class BitsClear:
    """None of the bits of `mask` (1 to 2**32 - 1) is set in argument `argument` (0 to 5)."""

    argument: int
    mask: int


Condition = OneOf | BitsClear


@dataclass(frozen=True)
class Rule:
    """When every condition holds, the call ends in `action` (a RET_* value, for RET_ERRNO or-ed with the
    errno)."""

    action: int
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One struct sock_filter: code, jumps when true and false (in instructions), operand."""

    code: int
    jump_true: int
    jump_false: int
    operand: int


def _arm(rule: Rule) -> list[Instruction]:
    """One rule, falling through to the instruction after it when a condition fails."""
    body: list[Instruction] = [Instruction(RETURN, 0, 0, rule.action)]
    # Assembled back to front: a failed condition jumps over all that is already there.
    for condition in reversed(rule.conditions):
        offset_low = OFFSET_ARGUMENTS + 8 * condition.argument
        away = len(body)
        if isinstance(condition, BitsClear):
            tests = [
                Instruction(LOAD_WORD, 0, 0, offset_low),
                Instruction(JUMP_ANY_BIT, away, 0, condition.mask),
            ]
        else:
            count = len(condition.values)
            tests = [
                Instruction(LOAD_WORD, 0, 0, offset_low + 4),
                Instruction(JUMP_EQUAL, 0, 1 + count + away, 0),
                Instruction(LOAD_WORD, 0, 0, offset_low),
                *(
                    Instruction(JUMP_EQUAL, left, away if left == 0 else 0, value)
                    for left, value in zip(range(count - 1, -1, -1), condition.values, strict=True)
                ),
            ]
        body[:0] = tests
    return body


def assemble(machine: Machine, rules: Mapping[int, Sequence[Rule]]) -> tuple[Instruction, ...]:
    """Make the filter for one machine.

    Args:
        machine: whose calls the numbers are; every other audit architecture is killed.
        rules: by system call number, in the mapping's order; of one call's rules the first that matches
            decides.
    Returns:
        The program: anything that no rule matches is RET_KILL_PROCESS.
    Raises:
        ConfinementError: a rule cannot be expressed (argument index, operand, too many values).
    """
    kill = Instruction(RETURN, 0, 0, RET_KILL_PROCESS)
    program = [
        Instruction(LOAD_WORD, 0, 0, OFFSET_ARCH),
        Instruction(JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        kill,
        Instruction(LOAD_WORD, 0, 0, OFFSET_NUMBER),
    ]
    if machine is Machine.X86_64:
        program += [Instruction(JUMP_GREATER_EQUAL, 0, 1, X32_SYSCALL_BIT), kill]
    for number, arms in rules.items():
        body = [instruction for rule in arms for instruction in _arm(_checked(rule))]
        if arms and arms[-1].conditions:
            body.append(kill)
        if not arms or len(body) > MAX_JUMP:
            raise ConfinementError(f"the seccomp rules of system call {number} do not fit one jump")
        program += [Instruction(JUMP_EQUAL, 0, len(body), number), *body]
    program.append(kill)
    if len(program) > MAX_INSTRUCTIONS:
        raise ConfinementError(
            f"the seccomp filter has {len(program)} instructions, the kernel takes {MAX_INSTRUCTIONS}"
        )
    return tuple(program)


def _checked(rule: Rule) -> Rule:
    for condition in rule.conditions:
        operands = condition.values if isinstance(condition, OneOf) else (condition.mask,)
        if not 0 <= condition.argument <= MAX_ARGUMENT:
            raise ConfinementError(
                f"a seccomp rule names argument {condition.argument}, calls have 0 to {MAX_ARGUMENT}"
            )
        if not operands or not all(0 <= operand < 1 << 32 for operand in operands):
            raise ConfinementError("a seccomp rule has no operand, or one that is not a 32-bit number")
    return rule


def pack(program: Iterable[Instruction]) -> bytes:
    """Return the program as an array of struct sock_filter (native byte order, 8 bytes each)."""
    return b"".join(struct.pack("=HBBI", step.code, step.jump_true, step.jump_false, step.operand) for step in program)
