"""Virtual TPMs, one per guest: isolated, measured, kept sealed under the platform TPM. See docs/architecture.md."""
