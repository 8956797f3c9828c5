"""Loads the compiled door to libtpms and says what was found; the one place where its absence is explained.

May be imported by `engine` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vtpm.engine.features import LibraryFacts
from vtpm.errors import EngineError

TPM_VERSION_1_2 = 0
TPM_VERSION_2 = 1
"""enum TPMLIB_TPMVersion."""

_EXTENSION = "vtpm.engine._libtpms"


def load() -> tuple[Any, Any]:
    """Return cffi's `ffi` and `lib` of the compiled door.

    Raises:
        EngineError: libtpms or the extension is absent, or the two do not fit together.
    """
    try:
        module = import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"libtpms cannot be used: the extension {error.name} has not been built",
            next_step="Install the packages libtpms-dev, python3-dev and gcc, then install vtpm again",
        ) from error
    except ImportError as error:
        raise EngineError(
            f"libtpms cannot be used: {error}",
            next_step="Install the package libtpms0 (Debian; elsewhere libtpms), version 0.9 or later",
        ) from error
    return module.ffi, module.lib


def inspect(lib: Any) -> LibraryFacts:
    """Return what the loaded libtpms has. No TPM may be running: it is asked to choose each version in turn.

    C: TPMLIB_GetVersion, TPMLIB_ChooseTPMVersion.
    """
    version = lib.TPMLIB_GetVersion()
    return LibraryFacts(
        version=(version >> 16, version >> 8 & 0xFF, version & 0xFF),
        has_tpm_1_2=lib.TPMLIB_ChooseTPMVersion(TPM_VERSION_1_2) == 0,
        has_tpm_2_0=lib.TPMLIB_ChooseTPMVersion(TPM_VERSION_2) == 0,
        has_set_profile=bool(lib.vtpm_has_set_profile()),
        has_was_manufactured=bool(lib.vtpm_has_was_manufactured()),
    )
