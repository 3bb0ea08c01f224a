"""The self-test of a machine, and the certificate of a device with a bundle."""

from sld_edge.runtime.selftest.self_test import self_test

__all__ = ["self_test"]
