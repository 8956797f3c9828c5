"""vtpm-keeper: alone talks to the platform TPM; unwraps one vTPM's key at a time."""
