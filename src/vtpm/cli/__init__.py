"""The vtpm command."""
