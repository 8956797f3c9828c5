"""vtpm-managerd as it is started: measures the services into the platform TPM, and becomes the manager."""
