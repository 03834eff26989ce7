"""Molmo2 on JAX: video-language models that point, count and track."""

__version__ = "0.1.0"
