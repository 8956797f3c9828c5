"""The starter's folder in the run directory: this boot's, and nobody else's to write. For the starter alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vtpm.errors import UnavailableError
from vtpm.measurement.record import CACHE_DIR, boot_dir, check_own


def prepare_folder(run_dir: Path) -> Path:
    """Make this boot's folder, remove those of others, and return the one for compiled files in it.

    A name that cannot be known before the boot, so that whoever could write to the disk before it (a run directory need
    not be in memory) has put nothing there.

    Raises:
        AccessDeniedError: it belongs to somebody else, or others may write to it.
        UnavailableError: it cannot be made.
    """
    folder = boot_dir(run_dir)
    cache = folder / CACHE_DIR
    try:
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        check_own(run_dir, run_dir.stat())
        for path in (folder.parent, folder, cache):
            path.mkdir(mode=0o755, exist_ok=True)
            check_own(path, path.lstat())
            if path.lstat().st_uid == os.geteuid():
                path.chmod(0o755)  # whatever the umask: all services read it
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
    except OSError as error:
        raise UnavailableError(f"the folder {folder} cannot be made: {error}") from error
    return cache
