"""Data sets, formats, scoring and the input pipeline."""
