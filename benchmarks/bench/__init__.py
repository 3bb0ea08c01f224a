"""Latency, memory and the price of safety, of a bundle and beside its peers; see docs/benchmark.md.

Everything measured is a process of its own, started and watched from outside.
"""
