"""What a TPM speaks: command and response headers, return codes, event log. Pure; imports errors alone."""
