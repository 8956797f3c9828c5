"""Measuring software: digests over names and contents, and what has been measured in this boot. Standard library only
beside wire; may be imported by every program."""
