"""Builds the compiled door to libtpms; everything else is in pyproject.toml, which cannot name cffi modules."""

from setuptools import setup

setup(cffi_modules=["src/vtpm/engine/_build.py:ffibuilder"])
