"""Builds the single-purpose virtual machine of a vTPM, reproducibly, and checks what was built.

`manifest` and `opened` are for whoever starts such a machine; the others are for whoever builds one. Imports wire, tpm
and errors alone. See docs/images.md.
"""
