"""Locks a process in, step by step, then runs it. Standard library only."""
