"""How one service starts another's interpreter. For whoever starts one."""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {"LC_ALL": "C", "OPENSSL_CONF": os.devnull}
"""What services are told, measured or not: the C library loads no module for another character set, and no copy of
OpenSSL takes a configuration, which can name code. (That of the cryptography wheel looks in a folder of its own.)"""


def cache_options() -> tuple[str, ...]:
    """Return the options by which a child keeps to the compiled files that this interpreter keeps to.

    Services that were measured take none from `__pycache__`: those are executed whatever is in the measured source.
    """
    return ("-X", f"pycache_prefix={sys.pycache_prefix}") if sys.pycache_prefix else ()
