"""Scorers: detectors of unsafe content, ONNX only, with the same small interface.

A scorer gives numbers; a `Rule` flags a picture by them. A scorer that cannot run is an error,
never a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers.activation import Activation, activation_scores
from sld_edge.runtime.scorers.base import Scorer, Scores, score_pictures
from sld_edge.runtime.scorers.clip_heads import Q16, ClipScore, Encoders, SdChecker
from sld_edge.runtime.scorers.miniworld import EXAMINER, JUDGE, MiniWorld
from sld_edge.runtime.scorers.nudenet import NudeNet
from sld_edge.runtime.scorers.opennsfw import OpenNsfw
from sld_edge.runtime.scorers.rule import (
    DEFAULT_RULES,
    Condition,
    Rule,
    flagged,
    rule_for,
    rule_from_text,
    text_from_rule,
)

__all__ = [
    "DEFAULT_RULES",
    "NAMES",
    "Condition",
    "Rule",
    "Scorer",
    "Scores",
    "activation_scores",
    "flagged",
    "rule_for",
    "rule_from_text",
    "score_pictures",
    "scorer_from_name",
    "scorers_from_names",
    "split_paths",
    "text_from_rule",
]

# The model of these scorers comes with a package; a path names a copy of it.
_SHIPPED: Mapping[str, Callable[[Path | None], Scorer]] = MappingProxyType(
    {
        "opennsfw": OpenNsfw,
        "nudenet": NudeNet,
        JUDGE.name: MiniWorld,
        EXAMINER.name: partial(MiniWorld, network=EXAMINER),
    }
)
# The folder of these scorers is made by sld-export from the user's weights.
_EXPORTED: Mapping[str, Callable[[Path, Encoders], Scorer]] = MappingProxyType(
    {"q16": Q16, "sd-checker": SdChecker, "clip-score": ClipScore}
)
NAMES = (*_SHIPPED, *_EXPORTED, "activation")
"""The names of all scorers."""


def scorer_from_name(
    name: str, path: Path | None = None, *, encoders: Encoders | None = None
) -> Scorer:
    """Load a scorer from `path`; `encoders` are image encoders that scorers share.

    Raises:
        InputError: an unknown name, or a path that is missing or not needed.
        MissingPackageError: its package is not installed.
        EngineError: its model is missing, altered or cannot be loaded.
    """
    if name in _SHIPPED:
        return _SHIPPED[name](path)
    if name in _EXPORTED:
        if path is None:
            raise InputError(
                f"scorer {name} needs its model",
                do=f"make it with sld-export --scorer {name} and name it as {name}=DIR",
            )
        return _EXPORTED[name](path, encoders if encoders is not None else {})
    _check_name(name)
    if path is not None:
        raise InputError("scorer activation has no model", got=path, do="leave the path out")
    return Activation()


def scorers_from_names(
    names: Sequence[str], paths: Mapping[str, Path] = MappingProxyType({})
) -> list[Scorer]:
    """Load scorers, each name once; they share CLIP's image encoder. `paths` are by name.

    Raises:
        UserError: as in `scorer_from_name`; InputError for a path of a scorer not in `names`.
    """
    unused = sorted(set(paths) - set(names))
    if unused:
        raise InputError(f"a path for scorer {unused[0]}, which is not among the scorers")
    encoders: Encoders = {}
    unique = dict.fromkeys(names)
    return [scorer_from_name(name, paths.get(name), encoders=encoders) for name in unique]


def split_paths(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Split the words of an option ("opennsfw", "q16=DIR") into names and paths by name.

    Raises:
        InputError: an unknown name.
    """
    paths = {}
    names = []
    for word in words:
        name, sign, path = word.partition("=")
        _check_name(name)
        names.append(name)
        if sign:
            paths[name] = Path(path)
    return tuple(dict.fromkeys(names)), paths


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise InputError("scorer", got=repr(name), expected=f"one of {', '.join(NAMES)}")
