"""vtpm-launcher: alone has privileges over the host; starts and stops domains, parks descriptors; knows no key."""
