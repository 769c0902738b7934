"""Rooms that the scripts at the root share; see the README for which is which."""
