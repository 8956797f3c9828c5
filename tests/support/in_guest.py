"""Puts this checkout's programs into a guest's image, with Python and all that they import.

For whoever runs vtpm's services inside a machine.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tests.support.guest import ImageSpec

CHECKOUT = Path(__file__).resolve().parents[2]
TSS_GROUP = 59
"""Whose the platform TPM's device has to be, as on Debian; the guest's set-up gives it to them."""
_MODULES = "/usr/local/lib/python3.11/dist-packages"
_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
_PROGRAM = "#!/usr/bin/python3.11 -I\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
# The first brings all of tpm2-tss but what that opens at run time; the others are loaded by Python's packages.
_LOADED = (
    *("libtss2-fapi.so.1", "libtss2-rc.so.0", "libtss2-tcti-device.so.0", "libtss2-tcti-swtpm.so.0", "libtpms.so.0"),
    *("libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1"),
)


def with_vtpm(spec: ImageSpec, programs: Mapping[str, str], needs: tuple[str, ...] = ("vtpm",)) -> ImageSpec:
    """Return a specification with vtpm in it.

    Args:
        spec: what is in it besides; its own files come first.
        programs: name in /usr/bin -> module with its `main`.
        needs: of Python's packages those that come with it, and all that they need; vtpm's own are for every program.
    """
    return replace(
        spec,
        packages=(*spec.packages, "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
        libraries=(*spec.libraries, *(_LIBRARIES / name for name in _LOADED)),
        trees={**spec.trees, f"{_MODULES}/vtpm": CHECKOUT / "src" / "vtpm"},
        files={
            **_dependencies(needs),
            **{f"/usr/bin/{name}": _PROGRAM.format(module=module).encode() for name, module in programs.items()},
            "/etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
            "/etc/group": f"root:x:0:\ntss:x:{TSS_GROUP}:\n".encode(),
            **spec.files,
        },
    )


def _dependencies(needs: tuple[str, ...]) -> Mapping[str, bytes]:
    """Every file of these packages, and of those that they need."""
    found: dict[str, bytes] = {}
    done: set[str] = set()
    waiting = list(needs)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # For another version of Python than this one.
            continue
        waiting += [
            re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in package.requires or () if "extra ==" not in line
        ]
        # An editable installation of vtpm has a file that names this checkout.
        left_out = {"__pycache__", ".."} | {f for f in map(str, package.files or ()) if f.endswith(".pth")}
        for file in package.files or ():
            if not left_out.intersection(file.parts):
                found[f"{_MODULES}/{file}"] = Path(str(file.locate())).read_bytes()
    return found
