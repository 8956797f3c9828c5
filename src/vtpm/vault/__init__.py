"""Keeps sealed state: envelope, versions, stores."""
