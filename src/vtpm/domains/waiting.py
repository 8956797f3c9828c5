"""Waiting for descriptors under asyncio. For the launcher and the kinds of domain."""

from __future__ import annotations

import asyncio


async def readable(fd: int) -> None:
    """Wait until a descriptor, which nobody else waits for in this loop, is readable."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
