"""Builds the single-purpose virtual machine of a vTPM, reproducibly."""
