"""Where sockets and state live when nobody says otherwise. Pure; for all of vtpm.

root has the system's directories; an ordinary user has the XDG ones and a manager of their own. There is no fallback to
a shared directory such as /tmp: whoever owns the socket's directory is who the client talks to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vtpm.errors import UsageError

SYSTEM_RUN_DIR = Path("/run/vtpm")
SYSTEM_STATE_DIR = Path("/var/lib/vtpm")
SYSTEM_CACHE_DIR = Path("/var/cache/vtpm")


def default_run_dir(uid: int, environ: Mapping[str, str]) -> Path:
    """Return the directory of the services' sockets.

    Args:
        uid: effective user id of who asks.
        environ: the environment; XDG_RUNTIME_DIR matters to ordinary users.
    Raises:
        UsageError: an ordinary user without a usable XDG_RUNTIME_DIR.
    Source: XDG Base Directory Specification 0.8 (relative paths are invalid).
    """
    if uid == 0:
        return SYSTEM_RUN_DIR
    base = _absolute(environ.get("XDG_RUNTIME_DIR"))
    if base is None:
        raise UsageError(
            "no place for vtpm's sockets: XDG_RUNTIME_DIR is not set to an absolute path",
            next_step=(
                "Set it to a directory of your own with mode 0700 (a login session sets /run/user/UID), "
                "or name the place: vtpm --socket PATH, vtpm-managerd --run-dir DIR"
            ),
        )
    return base / "vtpm"


def default_state_dir(uid: int, environ: Mapping[str, str]) -> Path:
    """Return the directory of what lasts.

    Args:
        uid: effective user id of who asks.
        environ: the environment; XDG_STATE_HOME and HOME matter to ordinary users.
    Raises:
        UsageError: an ordinary user with neither a usable XDG_STATE_HOME nor a HOME.
    Source: XDG Base Directory Specification 0.8.
    """
    if uid == 0:
        return SYSTEM_STATE_DIR
    return _of_user(environ, "XDG_STATE_HOME", Path(".local/state"), "state", "vtpm-managerd --state-dir DIR")


def default_image_dir(uid: int, environ: Mapping[str, str]) -> Path:
    """Return the directory of images of vTPMs' virtual machines: in it a folder per name, in that one per measurement.

    Args:
        uid: effective user id of who asks.
        environ: the environment; XDG_DATA_HOME and HOME matter to ordinary users.
    Raises:
        UsageError: an ordinary user with neither a usable XDG_DATA_HOME nor a HOME.
    Source: XDG Base Directory Specification 0.8.
    """
    if uid == 0:
        return SYSTEM_STATE_DIR / "images"
    return _of_user(environ, "XDG_DATA_HOME", Path(".local/share"), "images", "vtpm image --images DIR") / "images"


def default_cache_dir(uid: int, environ: Mapping[str, str]) -> Path:
    """Return the directory of what can be fetched again.

    Args:
        uid: effective user id of who asks.
        environ: the environment; XDG_CACHE_HOME and HOME matter to ordinary users.
    Raises:
        UsageError: an ordinary user with neither a usable XDG_CACHE_HOME nor a HOME.
    Source: XDG Base Directory Specification 0.8.
    """
    if uid == 0:
        return SYSTEM_CACHE_DIR
    return _of_user(environ, "XDG_CACHE_HOME", Path(".cache"), "cached packages", "vtpm image build --cache DIR")


def _of_user(environ: Mapping[str, str], variable: str, under_home: Path, what: str, option: str) -> Path:
    base = _absolute(environ.get(variable))
    home = _absolute(environ.get("HOME"))
    if base is None and home is not None:
        base = home / under_home
    if base is None:
        raise UsageError(
            f"no place for vtpm's {what}: neither {variable} nor HOME is set to an absolute path",
            next_step=f"Set one of them, or name the place: {option}",
        )
    return base / "vtpm"


def _absolute(text: str | None) -> Path | None:
    return Path(text) if text and Path(text).is_absolute() else None
