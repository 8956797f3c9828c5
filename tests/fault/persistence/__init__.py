"""Kills at every persistence step: the calls, seen from outside, and the operator who does things. See the test."""
