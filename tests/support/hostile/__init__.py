"""A vTPM's virtual machine in an attacker's hands: what runs in it, and how a test builds, starts and steers it."""
