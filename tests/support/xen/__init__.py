"""A host with real Xen, under emulation, and guests on it. Nothing of Xen is installed here."""

from tests.support.xen.host import XenGuest, XenGuestConfig, XenHost
from tests.support.xen.images import DOM0, FRONT_END, GUEST

__all__ = ["DOM0", "FRONT_END", "GUEST", "XenGuest", "XenGuestConfig", "XenHost"]
