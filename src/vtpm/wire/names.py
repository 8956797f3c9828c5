"""The rule for names that people give to vTPMs and peers. Pure."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def is_name(text: str) -> bool:
    """Whether a text is a name: harmless also as a file name or as a word of a command line.

    Letters, digits, ".", "_" and "-", starting with a letter or digit, 63 characters at most, no ".." and no "." at the
    end.
    """
    return _NAME.fullmatch(text) is not None and ".." not in text and not text.endswith(".")
