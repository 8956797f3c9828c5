"""Typed client of the manager's API, and what drives QEMU's live migration."""
