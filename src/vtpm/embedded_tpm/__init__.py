"""The embedded TPM: a software stand-in for a platform TPM, for machines without one. A program of its own."""
