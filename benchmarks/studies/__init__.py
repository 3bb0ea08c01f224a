"""Measurements, one command each; no wheel carries them."""
