"""Process title: what `ps` shows. For the confinement steps and for the services' entry modules."""

from __future__ import annotations

from pathlib import Path

from vtpm.confine import kernel
from vtpm.errors import ConfinementError


def set_title(program: str, rest: str = "") -> str:
    """Show this process as "PROGRAM REST" in `ps`, with the program's name as its comm; return the title.

    The arguments that the process was started with are overwritten. Needs /proc.

    Raises:
        ConfinementError: the area that holds the arguments is too small.
    """
    kernel.set_command_name(program.encode())
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Fields 48 and 49 of proc(5), arg_start and arg_end; `fields` begins at field 3.
    start, end = int(fields[45]), int(fields[46])
    title = f"{program} {rest}".strip().encode()
    if start <= 0 or len(title) + 2 > end - start:
        raise ConfinementError("the argument area is too small for the process title")
    # A last byte that is not NUL tells the kernel that the area was overwritten: it then shows up to the first NUL.
    kernel.overwrite_memory(start, title + b"\0" * (end - start - len(title) - 1) + b".")
    return title.decode()
