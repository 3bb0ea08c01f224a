"""What a device's owner has set and no caller lowers (docs/policy.md).

One file at a fixed place, which no environment variable moves. It must belong to the administrator
and be writable by no one else; otherwise nothing runs. A policy raises or refuses; it never lowers
anything in silence.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import InputError, PolicyError, one_line
from sld_edge.engines.files import json_from_bytes, read_limited
from sld_edge.runtime.safety import PRESETS, Safety, safety_from_preset

FORMAT, FORMAT_VERSION = "sld-edge-policy", 1
POLICY_FILE = (
    Path("C:/ProgramData/sld-edge/policy.json")
    if sys.platform == "win32"
    else Path("/etc/sld-edge/policy.json")
)
OnFlag = Literal["report", "escalate", "blur", "withhold", "escalate-withhold"]
ON_FLAG: tuple[OnFlag, ...] = get_args(OnFlag)
Recipe = Literal["keep", "omit"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
Custom = Literal["refuse", "stronger"]
Allow = Literal["allow", "refuse"]
_LIMIT = 1 << 20  # bytes of a policy
_OWNER = 0  # root; tests that do not run as root put their own user here
_LADDER = tuple(PRESETS)  # from off to max, each number by number at least as strong as the last
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SafetyRules:
    """What every picture must have.

    Attributes:
        minimum: the weakest preset.
        custom: "refuse" numbers that are no preset's, or take those that are "stronger" than the
            minimum, number by number.
        concepts_always: texts that are always steered away from, each with a branch of its own.
        cache_interval_max: largest interval between two whole UNet calls.
        guidance_scale: least and most.
        negative_prompt: whether callers may give one; it moves what the edit is measured from.
    """

    minimum: str = "off"
    custom: Custom = "refuse"
    concepts_always: tuple[str, ...] = ()
    cache_interval_max: int = 1
    guidance_scale: tuple[float, float] = (0.0, 100.0)
    negative_prompt: Allow = "refuse"


@dataclass(frozen=True, kw_only=True)
class PolicyScorer:
    """A scorer that judges every picture: the SHA-256 of its model and, of some, where it lies."""

    sha256: str
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ScreeningRules:
    """How every picture is judged before it leaves.

    Attributes:
        scorers: by name.
        rule_at_least: flags a picture, whatever a caller's own rule says.
        on_flag: the least that happens to a flagged picture.
        previews: whether unfinished pictures may be shown.
        report_recipe: whether the report of a flagged picture says how to make it again.
    """

    scorers: Mapping[str, PolicyScorer]
    rule_at_least: str
    on_flag: OnFlag = "withhold"
    previews: Literal["allow", "forbid"] = "forbid"
    report_recipe: Recipe = "omit"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A device's policy; without a file everything is allowed.

    Attributes:
        digest: SHA-256 of the file; None where there is none.
        safety: what every picture must have.
        screening: how every picture is judged; None leaves that to the caller.
        signers: keys, "ed25519:<base64>", one of which must have signed a bundle.
        bundles: SHA-256 of `bundle.json` of bundles that need no signature.
        trust_plan: whether a caller may run plans that no list names.
        allow_off: whether measurements (sld-eval, sld-bench) may make pictures below the minimum.
    """

    digest: str | None = None
    safety: SafetyRules | None = None
    screening: ScreeningRules | None = None
    signers: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    trust_plan: bool = True
    allow_off: bool = True

    @property
    def minimum(self) -> str:
        """The weakest preset that a picture may have."""
        return "off" if self.safety is None else self.safety.minimum

    def default_preset(self, preset: str) -> str:
        """Return what is taken where a caller names none: the bundle's own or the minimum."""
        ranks = {name: rank for rank, name in enumerate(_LADDER)}
        return max(preset, self.minimum, key=lambda name: ranks.get(name, len(ranks)))

    def require_safety(self, safety: Safety, *, calls: int) -> None:
        """Refuse the resolved numbers of one picture that are weaker than the minimum's.

        Raises:
            PolicyError: they are; or they are no preset's and the policy takes presets alone.
        """
        if self.safety is None:
            return
        floor = safety_from_preset(self.minimum, calls=calls)
        for name in _LADDER:
            if _numbers(safety_from_preset(name, calls=calls)) == _numbers(safety):
                if _LADDER.index(name) >= _LADDER.index(self.minimum):
                    return
                raise self.error("safety", got=name, expected=f"{self.minimum} or stronger")
        if self.safety.custom == "refuse":
            raise self.error(
                "safety numbers of your own", expected="a preset", do=f"use {self.minimum}"
            )
        if not _dominates(safety, floor):
            raise self.error(
                "safety numbers of your own",
                got=_text(safety),
                expected=f"each at least as strong as {self.minimum}'s: {_text(floor)}",
            )

    def require(self, allowed: bool, what: str, *, got: object = None, expected: object) -> None:
        """Refuse one setting.

        Raises:
            PolicyError: it is not allowed.
        """
        if not allowed:
            raise self.error(what, got=got, expected=expected)

    def require_previews(self, what: str) -> None:
        """Refuse to show pictures that were not screened, where the policy forbids previews.

        Raises:
            PolicyError: it does.
        """
        rules = self.screening
        allowed = rules is None or rules.previews == "allow"
        self.require(allowed, what, expected="none, or run()")

    def error(
        self, what: str, *, got: object = None, expected: object, do: str | None = None
    ) -> PolicyError:
        """Return an error that names the policy."""
        return PolicyError(
            f"the policy of this device ({POLICY_FILE}): {what}", got=got, expected=expected, do=do
        )

    def text(self) -> str:
        """Return what holds, as lines for a person."""
        if self.digest is None:
            return f"no policy: there is no {POLICY_FILE}; every caller chooses freely"
        lines = [f"policy {POLICY_FILE}, SHA-256 {self.digest}"]
        if self.safety is not None:
            rules = self.safety
            lines += [
                f"safety: {rules.minimum} or stronger; numbers of a caller's own: "
                + ("refused" if rules.custom == "refuse" else "each at least as strong"),
                f"guidance scale: {rules.guidance_scale[0]:g} to {rules.guidance_scale[1]:g}; "
                f"negative prompt: {rules.negative_prompt}",
                f"cache interval: at most {rules.cache_interval_max}",
            ]
            lines += [f"always steered away from: {text}" for text in rules.concepts_always]
        if self.screening is not None:
            screening = self.screening
            lines += [
                f"every picture is judged by {', '.join(screening.scorers)}; flagged where "
                f"{screening.rule_at_least}; then at least: {screening.on_flag}",
                f"previews: {screening.previews}; report of a flagged picture: recipe "
                f"{screening.report_recipe}",
            ]
        if self.signers or self.bundles:
            lines.append(
                f"bundles: signed by one of {len(self.signers)} keys, or one of "
                f"{len(self.bundles)} named by hash"
            )
        lines.append(f"plans that no list names: {'allowed' if self.trust_plan else 'refused'}")
        lines.append(f"measurements without safety: {'allowed' if self.allow_off else 'refused'}")
        return "\n".join(lines)


NO_POLICY = Policy()


def machine_policy() -> Policy:
    """Return this device's policy, read anew.

    Raises:
        PolicyError: there is a file that others could write, or that is no policy. Then nothing
            may run.
    """
    try:
        POLICY_FILE.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return NO_POLICY
    except OSError as error:  # a folder that this user may not look into hides a policy
        raise _unusable("it cannot be read", error.strerror) from error
    why = why_not_owned(POLICY_FILE)
    if why is not None:
        raise _unusable(why, "a file that is not root's alone")
    return policy_from_json(read_limited(POLICY_FILE, _LIMIT, error=PolicyError))


def policy_from_json(data: bytes) -> Policy:
    """Read a policy's bytes; an entry that is not known is refused, since someone relies on it.

    Raises:
        PolicyError: not a policy.
    """
    body = json_from_bytes(data, origin=f"the policy {POLICY_FILE}", error=PolicyError)
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
    policy = Policy(
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
    return policy


def _safety_rules(name: str, body: object) -> SafetyRules | None:
    entries = _Entries(name, body)
    entries.take("safety_interval_max", _count, 1)  # of older policies: no run skips branches now
    rules = SafetyRules(
        minimum=entries.take("minimum", _one_of(_LADDER), "off"),
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
        f"the policy {POLICY_FILE} cannot be used: {why}",
        got=what,
        do="nothing runs until its owner mends or removes it",
    )


def _numbers(safety: Safety) -> tuple[float, ...]:
    return (
        safety.scale,
        safety.warmup,
        safety.threshold,
        safety.momentum_scale,
        safety.momentum_beta,
    )


def _dominates(safety: Safety, floor: Safety) -> bool:
    """Whether settings are at least as strong, number by number.

    A longer memory (momentum_beta) delays an edit as well as keeping it, so it must be the same.
    """
    return (
        safety.scale >= floor.scale
        and safety.warmup <= floor.warmup
        and safety.threshold >= floor.threshold
        and safety.momentum_scale >= floor.momentum_scale
        and (safety.momentum_beta == floor.momentum_beta or not floor.acts)
    )


def _text(safety: Safety) -> str:
    names = ("scale", "warm-up", "threshold", "momentum scale", "beta")
    return ", ".join(f"{n} {v:g}" for n, v in zip(names, _numbers(safety), strict=True))
