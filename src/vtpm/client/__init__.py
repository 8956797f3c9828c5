"""Typed client of the manager's API."""
