"""Reading the policy of a device: one file, at a place that no environment variable moves.

The file must belong to the administrator and be writable by no one else; otherwise nothing runs.
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
    LADDER,
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

FORMAT, FORMAT_VERSION = "sld-edge-policy", 1
_LIMIT = 1 << 20  # bytes of a policy
_OWNER = 0  # root; tests that do not run as root put their own user here
T = TypeVar("T")


def machine_policy() -> Policy:
    """Return this device's policy, read anew.

    Raises:
        PolicyError: there is a file that others could write, or that is no policy. Then nothing
            may run.
    """
    try:
        policy.POLICY_FILE.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return NO_POLICY
    except OSError as error:  # a folder that this user may not look into hides a policy
        raise _unusable("it cannot be read", error.strerror) from error
    why = why_not_owned(policy.POLICY_FILE)
    if why is not None:
        raise _unusable(why, "a file that is not root's alone")
    return policy_from_json(read_limited(policy.POLICY_FILE, _LIMIT, error=PolicyError))


def policy_from_json(data: bytes) -> Policy:
    """Read a policy's bytes; an entry that is not known is refused, since someone relies on it.

    Raises:
        PolicyError: not a policy.
    """
    body = json_from_bytes(data, origin=f"the policy {policy.POLICY_FILE}", error=PolicyError)
    try:
        return _policy(_Entries("", body), hashlib.sha256(data).hexdigest())
    except (InputError, ValueError, TypeError) as error:
        raise _unusable("it is no valid policy", one_line(error)) from error


class _Entries:
    """An object of a policy; what is not taken in the end is an error."""

    def __init__(self, name: str, body: object) -> None:
        if not isinstance(body, dict):
            raise ValueError(f"{name or 'it'} is not an object")
        self._name, self._left = name, dict(body)

    def take(self, key: str, read: Callable[[str, Any], T], default: T) -> T:
        """Return one entry, read, or the default where it is absent."""
        name = f"{self._name}.{key}" if self._name else key
        return read(name, self._left.pop(key)) if key in self._left else default

    def need(self, key: str, read: Callable[[str, Any], T]) -> T:
        """Return one entry that must be there."""
        name = f"{self._name}.{key}" if self._name else key
        if key not in self._left:
            raise ValueError(f"it lacks {name}")
        return read(name, self._left.pop(key))

    def items(self) -> list[tuple[str, Any]]:
        """Return all entries, whatever they are called."""
        left, self._left = self._left, {}
        return list(left.items())

    def finish(self) -> None:
        """Refuse what was not taken."""
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
    for each in (bundles, evaluation, entries):
        each.finish()
    return rules


def _safety_rules(name: str, body: object) -> SafetyRules | None:
    entries = _Entries(name, body)
    entries.take("safety_interval_max", _count, 1)  # of older policies: no run skips branches now
    rules = SafetyRules(
        minimum=entries.take("minimum", _one_of(LADDER), "off"),
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
    found: dict[str, PolicyScorer] = {}
    for scorer, value in _Entries(name, body).items():
        if isinstance(value, str):
            found[scorer] = PolicyScorer(sha256=_sha256(name, value))
            continue
        entries = _Entries(f"{name}.{scorer}", value)
        found[scorer] = PolicyScorer(
            sha256=entries.need("sha256", _sha256), path=Path(entries.need("path", exact_text))
        )
        entries.finish()
    if not found:
        raise ValueError(f"{name} is empty")
    return MappingProxyType(found)


def _one_of(choices: Sequence[T]) -> Callable[[str, Any], T]:
    def read(name: str, value: Any) -> T:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} is none of {', '.join(map(str, choices))}")
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
        raise ValueError(f'{name}: a key is "ed25519:" and base64')
    return texts


def _sha256(name: str, value: object) -> str:
    text = exact_text(name, value)
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{name} is no SHA-256, 64 digits of 0-9 and a-f")
    return text


def why_not_owned(path: Path) -> str | None:
    """Say why a file is not the administrator's alone to write or exchange; None where it is."""
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


def _unusable(why: str, what: object) -> PolicyError:
    return PolicyError(
        f"the policy {policy.POLICY_FILE} cannot be used: {why}",
        got=what,
        do="nothing runs until its owner mends or removes it",
    )
