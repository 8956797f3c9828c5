"""The only door to libtpms: one process, one libtpms, one TPM."""
