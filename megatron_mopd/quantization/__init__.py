"""Checkpoints in NVFP4 and FP8: which tensor gets which format, how it is stored, and how it is read back."""
