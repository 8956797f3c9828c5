"""Tries to break confinement: what a process that was taken over can still do, and what the live process
looks like."""
