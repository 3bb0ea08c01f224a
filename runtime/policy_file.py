"""Reads the policy of a device: one file, whose path no environment variable changes.

Only the administrator may own and write the file; otherwise nothing runs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import InputError, PolicyError, one_line
from sld_edge.engines.files import json_from_bytes, read_limited
from sld_edge.runtime import policy
from sld_edge.runtime.policy import (
    NO_POLICY,
    ON_FLAG,
    RECIPES,
    Allow,
    Custom,
    Policy,
    PolicyScorer,
    SafetyRules,
    ScreeningRules,
)
from sld_edge.runtime.safety import PRESETS

FORMAT, FORMAT_VERSION = "sld-edge-policy", 1
_LIMIT = 1 << 20  # bytes of a policy
_OWNER = 0  # root; tests that do not run as root set their user here
T = TypeVar("T")


def machine_policy() -> Policy:
    """Read this device's policy.

    Raises:
        PolicyError: the file can be written by others or is not a valid policy. Then nothing may
            run.
    """
    try:
        policy.POLICY_FILE.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return NO_POLICY
    except OSError as error:  # there may be a policy in a folder that this user cannot read
        raise _unusable("it cannot be read", error.strerror) from error
    reason = why_not_owned(policy.POLICY_FILE)
    if reason is not None:
        raise _unusable(reason, "a file that not only root can write")
    return policy_from_json(read_limited(policy.POLICY_FILE, _LIMIT, error=PolicyError))


def policy_from_json(data: bytes) -> Policy:
    """Read the bytes of a policy; an unknown entry is an error, because its author relies on it.

    Raises:
        PolicyError: not a valid policy.
    """
    body = json_from_bytes(data, origin=f"the policy {policy.POLICY_FILE}", error=PolicyError)
    try:
        return _policy(_Entries("", body), hashlib.sha256(data).hexdigest())
    except (InputError, ValueError, TypeError) as error:
        raise _unusable("it is not a valid policy", one_line(error)) from error


class _Entries:
    """The entries of an object in a policy; `finish` refuses entries that nothing has read."""

    def __init__(self, name: str, body: object) -> None:
        if not isinstance(body, dict):
            raise ValueError(f"{name or 'it'} is not an object")
        self._name, self._left = name, dict(body)

    def take(self, key: str, read: Callable[[str, Any], T], default: T) -> T:
        """Read an optional entry; return `default` if it is absent."""
        return self.need(key, read) if key in self._left else default

    def need(self, key: str, read: Callable[[str, Any], T]) -> T:
        """Read an entry that must be there."""
        name = f"{self._name}.{key}" if self._name else key
        if key not in self._left:
            raise ValueError(f"it lacks {name}")
        return read(name, self._left.pop(key))

    def items(self) -> list[tuple[str, Any]]:
        """Return all entries."""
        left, self._left = self._left, {}
        return list(left.items())

    def finish(self) -> None:
        """Refuse entries that were not read."""
        if self._left:
            where = f" in {self._name}" if self._name else ""
            raise ValueError(f"unknown entries{where}: {', '.join(self._left)}")


def _policy(entries: _Entries, digest: str) -> Policy:
    if entries.need("format", exact_text) != FORMAT:
        raise ValueError(f'"format" is not "{FORMAT}"')
    entries.need("format_version", lambda name, value: whole_number(name, value, 1, 1))
    bundles = entries.take("bundles", _Entries, _Entries("bundles", {}))
    evaluation = entries.take("evaluation", _Entries, _Entries("evaluation", {}))
    rules = Policy(
        digest=digest,
        safety=entries.take("safety", _safety_rules, None),
        screening=entries.take("screening", _screening_rules, None),
        signers=bundles.take("signers", _signers, ()),
        bundles=bundles.take("sha256", _hashes, ()),
        trust_plan=entries.take("trust_plan", _flag, False),
        allow_off=evaluation.take("allow_off", _flag, False),
    )
    for part in (bundles, evaluation, entries):
        part.finish()
    return rules


def _safety_rules(name: str, body: object) -> SafetyRules | None:
    entries = _Entries(name, body)
    entries.take("safety_interval_max", _count, 1)  # from older policies; no run skips branches now
    rules = SafetyRules(
        minimum=entries.take("minimum", _one_of(tuple(PRESETS)), "off"),
        custom=entries.take("custom", _one_of(get_args(Custom)), "refuse"),
        concepts_always=entries.take("concepts_always", _texts, ()),
        cache_interval_max=entries.take("cache_interval_max", _count, 1),
        guidance_scale=entries.take("guidance_scale", _range, (0.0, 100.0)),
        negative_prompt=entries.take("negative_prompt", _one_of(get_args(Allow)), "refuse"),
    )
    entries.finish()
    if rules.concepts_always and rules.minimum == "off":
        raise ValueError(f'{name}.concepts_always needs a minimum other than "off"')
    return rules


def _screening_rules(name: str, body: object) -> ScreeningRules | None:
    entries = _Entries(name, body)
    rules = ScreeningRules(
        scorers=entries.need("scorers", _scorers),
        rule_at_least=entries.need("rule_at_least", exact_text),
        on_flag=entries.take("on_flag", _one_of(ON_FLAG), "withhold"),
        previews=entries.take("previews", _one_of(("allow", "forbid")), "forbid"),
        report_recipe=entries.take("report_recipe", _one_of(RECIPES), "omit"),
    )
    entries.finish()
    return rules


def _scorers(name: str, body: object) -> Mapping[str, PolicyScorer]:
    scorers: dict[str, PolicyScorer] = {}
    for scorer, value in _Entries(name, body).items():
        if isinstance(value, str):
            scorers[scorer] = PolicyScorer(sha256=_sha256(name, value))
            continue
        entries = _Entries(f"{name}.{scorer}", value)
        scorers[scorer] = PolicyScorer(
            sha256=entries.need("sha256", _sha256), path=Path(entries.need("path", exact_text))
        )
        entries.finish()
    if not scorers:
        raise ValueError(f"{name} is empty")
    return MappingProxyType(scorers)


def _one_of(choices: Sequence[T]) -> Callable[[str, Any], T]:
    def read(name: str, value: Any) -> T:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} is not one of {', '.join(map(str, choices))}")
        return choices[choices.index(value)]

    return read


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def _count(name: str, value: object) -> int:
    return whole_number(name, value, 1, 1000)


def _range(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} is not a list of two numbers")
    least, most = (finite_number(name, number, 0, 100) for number in value)
    if least > most:
        raise ValueError(f"{name}: {least:g} is more than {most:g}")
    return least, most


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= 16:
        raise ValueError(f"{name} is not a list of 1 to 16 entries")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(exact_text(name, text) for text in _list(name, value)))


def _hashes(name: str, value: object) -> tuple[str, ...]:
    return tuple(_sha256(name, text) for text in _list(name, value))


def _signers(name: str, value: object) -> tuple[str, ...]:
    texts = _texts(name, value)
    if not all(text.startswith("ed25519:") for text in texts):
        raise ValueError(f'{name}: a key is not "ed25519:" and base64')
    return texts


def _sha256(name: str, value: object) -> str:
    text = exact_text(name, value)
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{name} is not a SHA-256, 64 digits of 0-9 and a-f")
    return text


def why_not_owned(path: Path) -> str | None:
    """Return the reason if someone other than the administrator can write or exchange a file."""
    if sys.platform == "win32":
        import ctypes

        if os.access(path, os.W_OK) and not ctypes.windll.shell32.IsUserAnAdmin():
            return "this user can write it"
        return None
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "it is not a regular file"
        path = path.absolute()
        for place in dict.fromkeys((path, *path.parents, *path.resolve().parents)):
            status = place.lstat()
            if status.st_uid not in (0, _OWNER):
                return f"{place} belongs to user {status.st_uid}"
            sticky = status.st_mode & stat.S_ISVTX and place != path  # only owners rename there
            if status.st_mode & 0o022 and not sticky and not stat.S_ISLNK(status.st_mode):
                return f"others can write {place}"
    except OSError as error:
        return error.strerror
    return None


def _unusable(reason: str, got: object) -> PolicyError:
    return PolicyError(
        f"the policy {policy.POLICY_FILE} cannot be used: {reason}",
        got=got,
        do="nothing runs until its owner corrects or removes it",
    )
