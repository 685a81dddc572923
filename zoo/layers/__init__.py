"""Modules that two or more models share, and the wavelet and frequency layers."""
