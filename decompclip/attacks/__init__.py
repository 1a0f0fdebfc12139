"""Triggers, one a file: seeded pure functions on images in [0, 1]."""
