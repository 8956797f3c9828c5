"""What holds for every test: signals are as on a terminal, however the run itself was started."""

from __future__ import annotations

import signal

# A run in the background, or under nohup, is started with these ignored, and every program of ours would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGQUIT, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)
