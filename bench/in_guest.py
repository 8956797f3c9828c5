"""TPM commands as a guest's programs have them: a small program in the guest times them at /dev/tpm0 by itself.

For bench. The guest's clock is its own; nothing of the host's agent is in the times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.guest import TPM_IMAGE, Guest, GuestConfig, Image, build_image

_PROGRAM = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    unsigned char command[64], response[4096];
    struct timespec a, b;
    size_t size = strlen(argv[1]) / 2, i;
    int device = open("/dev/tpm0", O_RDWR), left = atoi(argv[2]);
    for (i = 0; i < size; i++)
        sscanf(argv[1] + 2 * i, "%2hhx", command + i);
    while (left-- > 0) {
        clock_gettime(CLOCK_MONOTONIC, &a);
        if (write(device, command, size) != (ssize_t)size || read(device, response, sizeof response) < 10)
            return 1;
        clock_gettime(CLOCK_MONOTONIC, &b);
        if (memcmp(response + 6, "\0\0\0\0", 4))
            return 2;
        printf("%ld\n", (b.tv_sec - a.tv_sec) * 1000000000L + b.tv_nsec - a.tv_nsec);
    }
    return 0;
}
"""
_PLACE = "usr/bin/time-tpm"
_TIMEOUT_S = 60.0


def image(work: Path) -> Image:
    """Build the guest's image with the program; `work` takes what is compiled."""
    program = work / "time-tpm"
    words = ["gcc", "-static", "-O2", "-s", "-x", "c", "-", "-o", str(program)]
    subprocess.run(words, input=_PROGRAM.encode(), check=True, timeout=60)
    spec = dataclasses.replace(
        TPM_IMAGE, name="bench", files={_PLACE: program.read_bytes()}, setup=f"chmod +x /{_PLACE}\n"
    )
    return build_image(spec)


@contextlib.contextmanager
def booted(made: Image, control_socket: Path, work: Path) -> Iterator[Guest]:
    """Boot a guest whose TPM is behind this control socket."""
    with Guest(GuestConfig(made, control_socket), work) as guest:
        yield guest


def time_block(guest: Guest, command: bytes, round_trips: int) -> list[float]:
    """Return the times of a block of round trips at the guest's /dev/tpm0, in seconds; each was a success."""
    printed = guest.check(f"time-tpm {command.hex()} {round_trips}", timeout_s=_TIMEOUT_S)
    return [int(line) / 1e9 for line in printed.split()]
