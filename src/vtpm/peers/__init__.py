"""The other hosts: who they are, and the authenticated channel to them. Knows nothing of what is said there."""
