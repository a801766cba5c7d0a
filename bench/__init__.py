"""Timing fused_adam against its peers: `python -m fused_adam.bench`."""
