"""Model inputs: media and text to arrays, in numpy and PyAV only."""
