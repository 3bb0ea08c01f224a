"""CUDA: memory, streams, events and graphs of one device."""
