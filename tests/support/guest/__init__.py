"""A real Linux guest in QEMU for tests and the demo: image builder, harness, checks of the guest's TPM.

Not part of the package vtpm and imports nothing of it.
"""

from tests.support.guest.agent import Result
from tests.support.guest.channel import GuestEnded, GuestError
from tests.support.guest.debian import GuestImageError
from tests.support.guest.guest import Firmware, Guest, GuestConfig, Reboot, TpmModel
from tests.support.guest.image import DEFAULT_CACHE, TPM_IMAGE, Image, ImageSpec, build_image
from tests.support.guest.swtpm import swtpm_emulator

__all__ = [
    "DEFAULT_CACHE",
    "Firmware",
    "Guest",
    "GuestConfig",
    "GuestEnded",
    "GuestError",
    "GuestImageError",
    "Image",
    "ImageSpec",
    "Reboot",
    "Result",
    "TPM_IMAGE",
    "TpmModel",
    "build_image",
    "swtpm_emulator",
]
