"""Proof that what is served is what was trained."""

from lexmill.engine.probes import probe_records, record
from lexmill.verify.compare import Check, Difference
from lexmill.verify.verify import Verification, verify

__all__ = ["Check", "Difference", "Verification", "probe_records", "record", "verify"]
