"""One operation a folder: a documented meaning, a float64 reference and fast implementations of it.

Import the operation itself, as in `from zoo.kernels.window_attention import window_attention`.
"""
