"""`plans.json`: the plans that were built for a bundle, each file with its hash.

A plan is code, and its description says whether host code in it may run. So neither is read before
its hash is checked. The list is not part of `bundle.json`, because a device builds plans itself and
`bundle.json` may be signed by someone else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from sld_edge.engines.checks import exact_text
from sld_edge.engines.errors import EngineError, InputError, UserError, one_line
from sld_edge.engines.files import Identity, json_from_file, sha256_of_file
from sld_edge.runtime.manifest import File
from sld_edge.runtime.manifest_file import file_from_json

PLANS = "plans.json"
FORMAT, FORMAT_VERSION = "sld-edge-plans", 1
_LIMIT = 1 << 20  # bytes
_DO = "build the plans again with sld-build"

PlanFiles = tuple[File, ...]
"""A plan, its description and, for a plan without weights, the graph with the weights."""


def plan_list(root: Path, bundle_sha256: str) -> dict[str, PlanFiles]:
    """Return the files of every listed plan, by component; empty without a list.

    Args:
        root: the folder of `plans.json`.
        bundle_sha256: SHA-256 of `bundle.json`; a list for another bundle is ignored.

    Raises:
        EngineError: the list is damaged.
    """
    path = root / PLANS
    try:
        path.lstat()
    except OSError:
        return {}
    body = json_from_file(path, error=EngineError, do=_DO, limit=_LIMIT)
    try:
        if (body["format"], body["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {body['format']} {body['format_version']}")
        if body["bundle_sha256"] != bundle_sha256:
            return {}
        return {exact_text("plan", name): _files(part) for name, part in body["plans"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise EngineError(f"{path} is not a list of plans", got=one_line(error), do=_DO) from error


def plan_list_json(bundle_sha256: str, plans: Mapping[str, PlanFiles]) -> str:
    """Return the text of `plans.json`."""
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle_sha256": bundle_sha256,
        "plans": {name: [asdict(file) for file in files] for name, files in plans.items()},
    }
    return json.dumps(body, indent=1) + "\n"


def listed_file(path: Path) -> File:
    """Return the list's entry for a file."""
    digest, seen = sha256_of_file(path)
    return File(path=path.name, sha256=digest, bytes=seen.size)


def require_listed(path: Path, file: File | None) -> Identity:
    """Refuse a file whose hash is not that of its entry in the list; None is no entry.

    Returns:
        The file's identity, which changes if the file is changed.

    Raises:
        EngineError: another hash or no entry; the error names the command to type.
    """
    try:
        digest, seen = sha256_of_file(path)
    except OSError as error:
        raise EngineError(f"cannot read {path}", got=error.strerror, do=_DO) from error
    require_digest(path, digest, file)
    return seen


def require_digest(path: Path, digest: str, file: File | None) -> None:
    """Refuse a SHA-256 that is not that of the entry; see `require_listed`."""
    if file is None or digest != file.sha256:
        raise EngineError(
            f"{path} belongs to no plan that was built for this bundle, and a plan is code",
            got=f"SHA-256 {digest[:12]}…, not in {PLANS}",
            do="build it with sld-build, or add --trust-plan if you know where it comes from",
        )


def _files(part: Any) -> PlanFiles:
    files = tuple(map(file_from_json, part))
    if len(files) not in (2, 3) or any(PurePosixPath(f.path).name != f.path for f in files):
        raise InputError("a plan's files", got=len(files), expected="2 or 3 in one folder")
    return files
