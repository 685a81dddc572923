"""Restorers: degraded image in, restored image out. One family, one file."""
