"""vtpm-managerd: entry. Measures keeper, manager and launcher before they run, and then becomes the manager.

With a platform TPM to measure into, it first becomes an interpreter that is started as the services are: isolated, and
with a folder of this boot's for compiled files. So its import path is theirs, and no file in `__pycache__` is executed,
which nobody measures. Without one it is the manager at once.

The starter cannot vouch for itself: it, the interpreter and the standard library are to be covered by what boots the
host. Decision record 19.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from vtpm.config import Config, read_arguments
from vtpm.confine.interpreter import ENVIRONMENT
from vtpm.errors import VtpmError

PROGRAM = "vtpm-managerd"
_ENVIRONMENT = (
    *("HOME", "TZ", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"),
    *("NOTIFY_SOCKET", "JOURNAL_STREAM", "INVOCATION_ID", "WATCHDOG_USEC", "WATCHDOG_PID"),
)
"""What measured services may be told by the environment; nothing of it names code, as LD_PRELOAD and LANG do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the services where they are to be, and run the manager until its end; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config = read_arguments(arguments)
        if config.measures:
            _measure(config, arguments)
    except (VtpmError, OSError) as error:
        # What logs is not loaded before it is needed: running vTPMs may be waiting for the manager.
        import logging

        from vtpm.wire.daemon import set_up_logging

        set_up_logging(PROGRAM)
        logging.getLogger(__name__).error("%s", error)
        return error.exit_status if isinstance(error, VtpmError) else VtpmError.exit_status
    # Here, and not at the top: the manager's code is loaded after it was measured.
    from vtpm.manager.main import main as manage

    return manage(arguments)


def _measure(config: Config, arguments: Sequence[str]) -> None:
    """Return in an interpreter that is as the services' are, when they were measured."""
    from vtpm.starter.folder import prepare_folder

    cache = prepare_folder(config.run_dir)
    options = ("-X", f"pycache_prefix={cache}")
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | ENVIRONMENT
    if not sys.flags.isolated or sys.pycache_prefix != os.fspath(cache) or os.environ != environment:
        _become("vtpm.starter.main", arguments, options, environment)
    from vtpm.starter.measure import Asked, measure_services
    from vtpm.wire.daemon import set_up_logging

    set_up_logging(PROGRAM)
    if measure_services(config, cache.parent) is Asked.TPM:
        # Without what talks to the platform TPM: the manager has no use for it. No keeper runs, so nobody waits.
        _become("vtpm.manager.main", arguments, options, environment)


def _become(module: str, arguments: Sequence[str], options: Sequence[str], environment: Mapping[str, str]) -> None:
    # The process stays the same: whoever started it (systemd, a terminal) has the manager under the same id.
    os.execve(sys.executable, [sys.executable, "-I", *options, "-m", module, *arguments], dict(environment))  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
