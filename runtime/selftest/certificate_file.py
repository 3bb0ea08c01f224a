"""The file of a certificate: strict JSON, without names of users, hosts and folders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sld_edge.engines.errors import InputError
from sld_edge.engines.files import json_from_bytes

FORMAT, FORMAT_VERSION = "sld-edge-device", 1
LIMIT = 4 << 20  # bytes
PASS, FAIL, INCOMPLETE = "pass", "fail", "incomplete"
_OUTCOMES = ("pass", "fail", "skipped", "not applicable")
_KEYS: Mapping[str, type] = {
    "format": str,
    "format_version": int,
    "verdict": str,
    "conditions": dict,
    "device": object,
    "bundle": dict,
    "settings": dict,
    "latency_s": dict,
    "memory": dict,
    "checks": list,
    "seconds": float,
}
_CHECK: Mapping[str, type] = {"name": str, "outcome": str, "text": str, "numbers": dict}
# Two or more folders: "/home/ann/sd15/unet.plan", "C:\Users\ann\sd15"; not "1.5 s/call".
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\"|;,:]+)+[/\\]([^/\\\s'\"|;,:]+)")


def verdict_of(outcomes: Iterable[str]) -> str:
    """Return the verdict: every check counts, and a skipped check never passes."""
    seen = set(outcomes)
    if "fail" in seen:
        return FAIL
    return INCOMPLETE if "skipped" in seen or "pass" not in seen else PASS


def certificate_json(certificate: Mapping[str, Any], *, private: Iterable[Path] = ()) -> bytes:
    """Return a certificate as JSON; paths are cut to their last name.

    Args:
        certificate: from `certify`.
        private: folders whose names may have spaces, like the bundle's and the home folder.
    """
    names = sorted({str(path) for path in private if len(path.parts) > 1}, key=len, reverse=True)
    text = json.dumps(_cleaned(certificate, names), indent=1, allow_nan=False)
    return f"{text}\n".encode()


def certificate_from_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """Read a certificate.

    Raises:
        InputError: not a certificate of this version, a verdict that its checks do not give, or a
            path.
    """
    body = json_from_bytes(data, origin=origin, error=InputError)
    _require(body, _KEYS, origin)
    if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
        got = f"{body['format']} {body['format_version']}"
        raise InputError(origin, got=got, expected=f"{FORMAT} {FORMAT_VERSION}")
    for check in body["checks"]:
        _require(check, _CHECK, f"{origin}: a check")
        if check["outcome"] not in _OUTCOMES:
            raise InputError(f"{origin}: {check['name']}", got=check["outcome"], expected=_OUTCOMES)
    verdict = verdict_of(check["outcome"] for check in body["checks"])
    if body["verdict"] != verdict:
        raise InputError(f"{origin}: verdict", got=body["verdict"], expected=verdict)
    if _cleaned(body, []) != body:
        raise InputError(f"{origin} names a folder", do="write it again with sld-run --certify")
    return body


def _require(body: object, keys: Mapping[str, type], origin: str) -> None:
    if not isinstance(body, dict) or set(body) != set(keys):
        got = ", ".join(sorted(body)) if isinstance(body, dict) else type(body).__name__
        raise InputError(f"{origin}: entries", got=got, expected=", ".join(sorted(keys)))
    for key, kind in keys.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(body[key], allowed) or isinstance(body[key], bool):
            raise InputError(f"{origin}: {key}", got=repr(body[key]), expected=kind.__name__)


def _cleaned(value: Any, names: list[str]) -> Any:
    if isinstance(value, str):
        for name in names:
            value = value.replace(name, Path(name).name)
        return _PATH.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: _cleaned(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, names) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    return value
