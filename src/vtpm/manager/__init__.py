"""vtpm-managerd: registry, life cycle, vault, API. Unprivileged."""
