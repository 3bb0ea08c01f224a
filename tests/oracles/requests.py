"""Requests from flat settings, as `Pipeline.__call__` takes them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sld_edge.runtime import Framing, Request, Sampling, Savings

_RECORDS = {"sampling": Sampling, "savings": Savings, "framing": Framing}


def flat_request(*, prompts: tuple[str, ...], **settings: Any) -> Request:
    """Put each setting into its record."""
    records = {}
    for record, kind in _RECORDS.items():
        names = {field.name for field in fields(kind)} & settings.keys()
        records[record] = kind(**{name: settings.pop(name) for name in names})
    return Request(prompts=prompts, **records, **settings)
