"""Entry of the virtual machine of an swtpm-make vTPM: the vtpmd's own boot and links, and swtpm as what they serve."""

from __future__ import annotations

import os
from functools import partial

from vtpm.foreign.swtpm_engine import SwtpmEngine
from vtpm.instance import vm_boot, vm_main

_FOLDER = "/tpm"
"""In the initramfs, so in memory."""


def main() -> None:
    """Be the first process of a virtual machine."""
    os.mkdir(_FOLDER, 0o700)  # noqa: PTH102 (the image has no pathlib)
    vm_main.run(vm_boot, partial(SwtpmEngine, folder=_FOLDER))
