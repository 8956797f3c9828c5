"""Figures side by side with Debian's swtpm, taken in one run; `python -m bench` is what `make bench` runs."""
