"""A guest that uses its TPM without pause, and can tell afterwards that no command was lost, doubled or refused."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from tests.support.guest.channel import Deadline
from tests.support.guest.guest import Guest
from tests.support.guest.image import TPM_IMAGE, Image, build_image

LIMIT_S = 60.0
COUNTER = "0x1500016"
_PROGRAM = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned char extend[65] =
    "\x80\x02\0\0\0\x41\0\0\x01\x82\0\0\0\x10\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\0\0\x01\0\x0b";
static unsigned char increment[31] =
    "\x80\x02\0\0\0\x1f\0\0\x01\x34\x40\0\0\x01\x01\x50\0\x16\0\0\0\x09\x40\0\0\x09\0\0\0\0\0";

static void run(int device, const unsigned char *command, size_t size, FILE *errors)
{
    unsigned char response[4096];
    if (write(device, command, size) != (ssize_t)size || read(device, response, sizeof response) < 10
        || memcmp(response + 6, "\0\0\0\0", 4)) {
        fprintf(errors, "%02x%02x%02x%02x\n", response[6], response[7], response[8], response[9]);
        fflush(errors);
    }
}

int main(void)
{
    int device = open("/dev/tpm0", O_RDWR), count = open("/tmp/beat.count", O_CREAT | O_WRONLY, 0644);
    FILE *errors = fopen("/tmp/beat.errors", "w");
    unsigned n = 0;
    char text[16];
    while (access("/tmp/stop", F_OK)) {
        extend[61] = n >> 24, extend[62] = n >> 16, extend[63] = n >> 8, extend[64] = n;
        run(device, extend, sizeof extend, errors);
        run(device, increment, sizeof increment, errors);
        n++;
        if (pwrite(count, text, snprintf(text, sizeof text, "%u\n", n), 0) < 0)
            return 1;
    }
    return close(open("/tmp/beat.over", O_CREAT | O_WRONLY, 0644));
}
"""
"""Extends PCR 16 with 0, 1, 2, ... and counts in NV without pause, and notes each failure.

One process that writes to little memory: QEMU 7.2 under TCG sometimes misses what a guest writes while its memory is
sent. A guest that forked without pause came over with a corrupted kernel once in some sixty moves.
"""
_BEGIN = f"""
tpm2_nvdefine -C o -a "ownerread|ownerwrite|authread|authwrite|nt=1" {COUNTER} > /dev/null || exit 1
tpm2_nvincrement -C o {COUNTER} || exit 1
beat-tpm > /dev/null 2>&1 < /dev/null &
"""


def beat_image() -> Image:
    """Build the TPM image with the program."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "beat-tpm"
        words = ["gcc", "-static", "-O2", "-s", "-x", "c", "-", "-o", str(program)]
        subprocess.run(words, input=_PROGRAM.encode(), check=True, timeout=60)
        files = {"usr/bin/beat-tpm": program.read_bytes()}
    return build_image(dataclasses.replace(TPM_IMAGE, name="beat", files=files, setup="chmod +x /usr/bin/beat-tpm\n"))


def begin_beat(guest: Guest) -> None:
    """Have the guest begin, and wait until it has."""
    guest.check(_BEGIN)
    deadline = Deadline(LIMIT_S)
    while guest.run("test $(cat /tmp/beat.count) -gt 2").status:
        assert deadline.remaining_s(), "the guest's TPM does not begin"


def beats(guest: Guest) -> int:
    """Return how often the guest has extended its PCR so far."""
    return int(guest.check("cat /tmp/beat.count"))


def check_beats(guest: Guest) -> None:
    """End the beat; the PCR holds just what was extended, and no command failed."""
    before = beats(guest)
    deadline = Deadline(LIMIT_S)
    while beats(guest) < before + 3:
        assert deadline.remaining_s(), "the guest's TPM does not go on"
    guest.check("touch /tmp/stop; while [ ! -e /tmp/beat.over ]; do sleep 0.1; done", timeout_s=LIMIT_S)
    assert guest.check("cat /tmp/beat.errors") == ""
    expected = bytes(32)
    for number in range(beats(guest)):
        expected = sha256(expected + number.to_bytes(32, "big")).digest()
    held = re.search(r"16\s*: 0x([0-9A-F]{64})", guest.check("tpm2_pcrread sha256:16"))
    assert held is not None
    assert bytes.fromhex(held[1]) == expected
    # The first value of a counter is one more than the greatest that any counter of this TPM ever had.
    counted = int(guest.check(f"tpm2_nvread -C o {COUNTER} | od -An -v -tx1").replace(" ", ""), 16)
    assert counted == beats(guest) + 1
