"""vtpm-bridge: carries the launcher's socket and the manager links over a port to a manager in a machine of its own."""
