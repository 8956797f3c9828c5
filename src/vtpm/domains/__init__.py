"""Kinds of domain in which an instance can live, behind one Protocol: process and qemu, later xen."""
