"""The attack: its search, its prompts, and the command as a user types it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation.small_runs import small_settings
from sld_edge.benchmarks.evaluation import attack as command
from sld_edge.benchmarks.evaluation.attack import Found, Judge, attack, main
from sld_edge.benchmarks.evaluation.evaluator import Task
from sld_edge.benchmarks.evaluation.prompt_search import (
    MOST_TOKENS,
    Picture,
    Search,
    SearchSettings,
    Vocabulary,
)
from sld_edge.benchmarks.evaluation.prompts import read_prompts
from sld_edge.benchmarks.evaluation.settings import settings_from_names
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.scorers import rule_from_text

TINY = SearchSettings(
    seed=3,
    first=3,
    proposals=6,
    children=3,
    cheap_steps=1,
    promoted=1,
    leaders=1,
    steps=2,
    full=1,
    semifinal=(2, 1),
    final=(2, 2),
)
BUNDLE = Bundle.open()
VOCABULARY = Vocabulary(BUNDLE)
"""The miniature's."""


def counted(text: str) -> float:
    """A score without a picture: four times the word "alley" is best."""
    return min(text.split().count("alley"), 4) / 4


def searched(seed: int, rounds: int, *, noise: float = 0.3) -> Search:
    draws = np.random.default_rng(seed)

    def judge(pictures: Sequence[Picture], steps: int) -> list[float]:
        return [counted(text) + noise * draws.normal() for text, _ in pictures]

    def embed(text: str) -> np.ndarray:
        ids = [*VOCABULARY.tokens(text), *[0] * MOST_TOKENS][:MOST_TOKENS]
        return np.bincount(ids, minlength=700).astype(np.float32)

    search = Search(VOCABULARY, judge, embed, SearchSettings(seed=seed))
    search.begin(BUNDLE.manifest.safety_concepts, [])
    for _ in range(rounds):
        search.round()
    return search


def test_every_prompt_survives_the_way_to_tokens_and_back() -> None:
    draws = np.random.default_rng(0)
    for _ in range(300):
        tokens = draws.choice(VOCABULARY.ids, draws.integers(1, 40)).tolist()
        prompt = VOCABULARY.prompt(tokens)
        if prompt is not None:
            text, own = prompt
            assert VOCABULARY.tokens(text) == own
            assert VOCABULARY.text(own) == text
            assert 1 <= len(own) <= MOST_TOKENS
    assert VOCABULARY.prompt([]) is None


def test_half_of_a_character_is_no_prompt() -> None:
    first, last = VOCABULARY.tokens("é")
    assert VOCABULARY.prompt([first, last]) is not None
    assert VOCABULARY.prompt([last]) is None
    assert last not in VOCABULARY.ids


def test_a_search_finds_the_best_prompts_in_spite_of_noise() -> None:
    best = searched(1, rounds=8).best(3)
    assert counted(best[0].text) == 1
    sets = [set(candidate.tokens) for candidate in best]
    assert all(len(a & b) <= 0.6 * len(a | b) for a, b in itertools.combinations(sets, 2))


def test_pictures_of_one_round_share_seeds_and_rounds_share_none() -> None:
    asked: list[set[int]] = []

    def judge(pictures: Sequence[Picture], steps: int) -> list[float]:
        asked.append({seed for _, seed in pictures})
        assert len(pictures) == len(set(pictures))
        return [counted(text) for text, _ in pictures]

    search = Search(VOCABULARY, judge, lambda text: np.ones(2, np.float32), TINY)
    search.begin(["skull"], [])
    search.round()
    seeds = [seed for group in asked for seed in group]
    assert len(asked) == 6
    assert len(seeds) == len(set(seeds)) == 2 * (2 + 1 + 2)


def test_few_pictures_count_little() -> None:
    search = searched(1, rounds=0)
    lucky, proven = search.candidates[:2]
    lucky.cheap, lucky.full = [1.0], [1.0]
    proven.cheap, proven.full = [1.0], [1.0] * 9 + [0.5]
    assert lucky.mean > proven.mean
    assert lucky.estimate(0) < proven.estimate(0)


def test_the_prompts_of_another_search_come_first() -> None:
    search = Search(VOCABULARY, lambda p, _: [0.0] * len(p), lambda _: np.ones(2, np.float32), TINY)
    search.begin(["skull"], ["party big 7", "a snow \N{SKULL}"])
    assert search.candidates[0].text == "party big 7"


def test_a_seed_makes_the_same_prompts_again_and_another_seed_others() -> None:
    first, again, other = (
        [candidate.text for candidate in searched(seed, rounds=2).candidates] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_one_process_and_two_find_the_same_prompts_with_the_same_pictures() -> None:
    setting = settings_from_names(["max"])[-1]
    settings = small_settings(protocol="per-prompt")

    def run(processes: int) -> tuple[list[Found], int, int]:
        found, judge = attack(
            settings, setting, TINY, pictures=12, processes=processes, say=lambda _: None
        )
        return found, judge.pictures, judge.calls

    first = run(1)
    assert first == run(2)
    assert len(first[0]) == 2
    assert first[1] == 12 + 2 * 1 + 2 * 2


def test_the_judge_counts_and_stops_at_its_budget() -> None:
    def score(tasks: Sequence[Task], steps: int) -> list[tuple[dict[str, float], int]]:
        return [({"a.b": 0.25}, steps) for _ in tasks]

    judge = Judge(score, rule_from_text("a.b>=0.5 or a.b<=0.125"), group=2)
    judge.limit(pictures=3)
    pictures = [("text", seed) for seed in range(9)]
    assert judge(pictures, 5) == [-0.125] * 3
    assert (judge.pictures, judge.calls, judge.spent) == (3, 15, True)
    judge.limit()
    assert len(judge(pictures, 5)) == 9
    judge.limit(minutes=0)
    assert judge(pictures, 5) == []


def test_the_output_is_a_prompt_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "max.jsonl"
    finished = Judge(lambda tasks, steps: [], (), group=1)
    found = [Found(text='big "7"', flagged=7, pictures=20)]
    monkeypatch.setattr(command, "attack", lambda *_, **__: (found, finished))
    words = ["--safety", "max", "--output", str(path)]
    assert main(words) == 0
    (prompt,) = read_prompts(path).prompts
    assert prompt.text == 'big "7"'
    assert prompt.categories == ("adversarial", "adversarial: max")
    line = json.loads(path.read_text())
    assert (line["found_against"], line["flagged"], line["pictures"]) == ("max", 7, 20)
    assert "7 of 20" in capsys.readouterr().out
    assert main(words) == 2
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--safety", "most"], "one of off, weak"),
        (["--safety", "max", "--minutes", "0"], "--minutes"),
        (["--safety", "max", "--minutes", "nan"], "--minutes"),
        (["--safety", "max", "--minutes", "1e-9"], "raise --minutes"),
        (["--safety", "max", "--seed", "-1"], "--seed"),
        (["--safety", "max", "--start", "none.jsonl"], "none.jsonl"),
        (["--safety", "max", "--scorer", "eye"], "scorer"),
        (["--safety", "max", "--bundle", "nowhere"], "nowhere"),
        ([], "--safety"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert main([*words, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert not output.exists()
