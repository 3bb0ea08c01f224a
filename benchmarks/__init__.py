"""Measurements: speed and memory against peers, how safe, and the miniature world."""
