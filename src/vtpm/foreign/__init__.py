"""vTPMs of other makes: their programs, unchanged, behind the vtpmd's own links. Each runs in a virtual machine alone.

An adapter gives the instance what the engine gives it, and keeps the promise that the other program knows nothing of:
no command is answered before the manager has what it changed. Decision record 24.
"""
