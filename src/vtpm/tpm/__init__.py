"""What a TPM speaks, and what is measured into it: headers, return codes, event logs, PCRs, images.

Pure; imports errors alone.
"""
