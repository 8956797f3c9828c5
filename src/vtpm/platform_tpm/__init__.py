"""The host's TPM, hardware or stand-in, through tpm2-pytss: sealing under PCRs. For the keeper alone."""
