"""Options from a dataclass: types, defaults, groups, and one line for a mistake."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from sld_edge.engines.errors import InputError
from sld_edge.runtime.commands.arguments import (
    REQUIRED,
    add_options,
    flag,
    option,
    parsed,
)
from sld_edge.runtime.commands.console import Parser


@dataclass(frozen=True, kw_only=True)
class Settings:
    words: tuple[str, ...] = option("words", "WORD", default=(), positional=True, nargs="*")
    output: Path = option("where to", "DIR", default=REQUIRED)
    colour: Literal["red", "blue"] | None = option("of the star", group="picture")
    sizes: tuple[int, ...] = option("pixels", default=(1, 2))
    text: tuple[str, ...] = option("given again", default=(), action="append")
    more: tuple[str, ...] | None = option("several, and again", action="extend")
    peers: tuple[str, ...] | None = option("all, or these", nargs="*")
    eta: float = option("noise", default=0.0)
    seed: int | None = option("first seed (default: random)")
    force: bool = flag("replace it")
    use_graph: bool = flag("one by one", default=True)


def cli() -> Parser:
    parser = Parser(prog="test", description="A test.", epilog="")
    add_options(parser, Settings)
    return parser


def test_what_is_not_given_is_the_dataclass_s_default() -> None:
    assert parsed(cli(), Settings, ["--output", "x"]) == Settings(output=Path("x"))
    assert vars(cli().parse_args(["--output", "x"])) == {"words": [], "output": Path("x")}


@dataclass(frozen=True, kw_only=True)
class OneWord:
    bundle: Path | None = option("a bundle", "BUNDLE", positional=True, nargs="?")


def test_a_word_may_be_left_out() -> None:
    parser = Parser(prog="test", description="A test.", epilog="")
    add_options(parser, OneWord)
    assert parsed(parser, OneWord, []) == OneWord()
    assert parsed(parser, OneWord, ["x"]) == OneWord(bundle=Path("x"))


def test_every_kind_is_read() -> None:
    line = "a b --output x --colour red --sizes 3 4 --text p --text q --more r s --more t --peers"
    line += " --eta 0.5 --seed 7 --force --no-use-graph"
    assert parsed(cli(), Settings, line.split()) == Settings(
        words=("a", "b"),
        output=Path("x"),
        colour="red",
        sizes=(3, 4),
        text=("p", "q"),
        more=("r", "s", "t"),
        peers=(),
        eta=0.5,
        seed=7,
        force=True,
        use_graph=False,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: --output"),
        ("--output x --colour green", "--colour | got 'green' | expected one of red, blue"),
        ("--output x --seed much", "argument --seed: invalid int value: 'much'"),
        ("--output x --sizes", "argument --sizes: expected at least one argument"),
        ("--output x --sees 1", "unrecognized arguments: --sees"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parsed(cli(), Settings, line.split())
    assert "\n" not in str(caught.value)


def test_the_help_names_groups_and_defaults() -> None:
    text = re.sub(r"\s+", " ", cli().format_help())
    for part in (
        "Picture: --colour NAME of the star",
        "--sizes N [N ...] pixels (default: 1 2)",
        "--eta X noise (default: 0)",
        "--seed N first seed (default: random)",
        "--force replace it --no-use-graph one by one",
    ):
        assert part in text
