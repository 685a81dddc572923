"""Modules that two or more models share, and the wavelet layer."""
