"""Data sets, formats, scoring and the input pipeline: everything that knows where examples come from."""
