"""What enters the model: media and text to arrays, in numpy and PyAV only."""
