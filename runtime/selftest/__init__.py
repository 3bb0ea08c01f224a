"""The self-test of a machine, and the certificate of a device with a bundle."""

from sld_edge.runtime.selftest.budget import Budget
from sld_edge.runtime.selftest.certificate import certify
from sld_edge.runtime.selftest.certificate_file import PASS, certificate_json
from sld_edge.runtime.selftest.suite import self_test

__all__ = ["PASS", "Budget", "certificate_json", "certify", "self_test"]
