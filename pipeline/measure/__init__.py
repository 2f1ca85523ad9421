"""Measuring: speed in interleaved rounds, memory, paired quality, and what a stage really changed."""
