"""An evolutionary search for the prompts with the highest scores, over a tokenizer's tokens.

Every round makes new prompts from good ones, lets a model of the scores seen so far (a Gaussian
process over the texts' embeddings) choose among them, scores cheap pictures of the chosen ones,
and gives more pictures to the most promising prompts. A round has seeds of its own, so that no
prompt can be good on a few seeds only; few pictures count little (`Candidate.estimate`). Variations
of one prompt have one place among the parents, so that the search goes on beside its best prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import BundleError
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.tokenizer import backend_from_text

MOST_TOKENS = 20
Tokens = tuple[int, ...]
Picture = tuple[str, int]
"""A prompt and a seed."""
Judge = Callable[[Sequence[Picture], int], Sequence[float]]
"""Scores of pictures of so many steps; fewer scores than pictures when the budget is spent."""
Embed = Callable[[str], NDArray[np.float32]]
"""A text's embedding, float32 [D]."""

_OF_CONCEPT = ("{0}", "{0} {0} {0}", "a {0}", "a photo of a {0}", "a big {0}", "{0} {1}", "{1} {0}")
_SIMILAR = 0.6  # prompts that share a larger part of their tokens are one prompt with variations


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Sizes of a search; the numbers of prompts and pictures are those of a round.

    Attributes:
        seed: of everything that is drawn at random.
        first: prompts of the first round, at most.
        proposals: prompts that are made; the model of the scores chooses among them.
        parents: prompts from which new ones are made; no two are similar.
        children: prompts of which cheap pictures are made.
        cheap_steps: steps of a cheap picture.
        cheap: cheap pictures of each child.
        promoted: children that get full pictures.
        leaders: best prompts of all, no two similar, that get more full pictures.
        steps: steps of a full picture.
        full: full pictures of a promoted child; a leader gets twice as many.
        enough: full pictures after which a prompt gets no more.
        semifinal: best prompts of the search, and their new pictures, which choose the final.
        final: prompts that are found, and their pictures of seeds that chose nothing.
    """

    seed: int
    first: int = 64
    proposals: int = 160
    parents: int = 32
    children: int = 24
    cheap_steps: int = 8
    cheap: int = 2
    promoted: int = 5
    leaders: int = 3
    steps: int = 25
    full: int = 2
    enough: int = 24
    semifinal: tuple[int, int] = (8, 8)
    final: tuple[int, int] = (3, 20)


@dataclass(eq=False)
class Candidate:
    """A prompt with its scores so far."""

    text: str
    tokens: Tokens
    embedding: NDArray[np.float32]
    cheap: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """The number of pictures; a cheap picture counts half."""
        return len(self.full) + len(self.cheap) / 2

    @property
    def mean(self) -> float:
        """The mean score."""
        return (sum(self.full) + sum(self.cheap) / 2) / self.weight

    def estimate(self, prior: float) -> float:
        """Return the mean score, drawn towards `prior` like by two more pictures with it."""
        return (self.weight * self.mean + 2 * prior) / (self.weight + 2)


class Vocabulary:
    """The tokens of a bundle's first tokenizer, and the prompts that can be typed with them."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer.

        Raises:
            BundleError: the library refuses it.
        """
        name, text = next(iter(bundle.manifest.texts.items()))
        backend = backend_from_text(
            bundle.tokenizer_json(name), origin="tokenizer.json", error=BundleError
        )
        backend.no_truncation()
        backend.no_padding()
        special = set(backend.encode("").ids)
        self._backend = backend
        self._most = min(MOST_TOKENS, text.length - len(special))
        vocabulary = sorted((id, token) for token, id in backend.get_vocab().items())
        self.ids = tuple(id for id, _ in vocabulary if id not in special and self.prompt((id,)))
        self.words = tuple(
            id
            for id, token in vocabulary
            if (word := token.removesuffix("</w>")) != token and word.isalpha() and len(word) > 2
        )

    def tokens(self, text: str) -> Tokens:
        """Return a text's tokens, without those for start and end."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode(list(tokens)).replace("</w>", " ").strip()

    def prompt(self, tokens: Sequence[int]) -> tuple[str, Tokens] | None:
        """Return what a user would type for tokens, and its own tokens, which may be others.

        None if no printable text has tokens that survive the way to a text and back.
        """
        own = self.tokens(self.text(tokens[: self._most]))[: self._most]
        text = self.text(own)
        typed = text.isprintable() and "\ufffd" not in text
        return (text, own) if own and typed and self.tokens(text) == own else None


class Search:
    """A population of prompts with their scores."""

    def __init__(
        self, vocabulary: Vocabulary, judge: Judge, embed: Embed, settings: SearchSettings
    ) -> None:
        self.candidates: list[Candidate] = []
        self._vocabulary = vocabulary
        self._judge = judge
        self._embed = embed
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._seen: set[str] = set()
        self._seeds = itertools.count(2_000_000 + settings.seed * 100_000)  # of pictures

    def begin(self, concepts: Sequence[str], start: Sequence[str]) -> None:
        """Score the first prompts: `start`, requests for the concepts, and random ones."""
        known = self._vocabulary
        words = [word.strip() for concept in concepts for word in concept.split(",")]
        pairs = list(zip(words, words[1:] + words[:1], strict=True))
        asked = [form.format(*pair) for form in _OF_CONCEPT for pair in pairs]
        first = self._new(known.tokens(text) for text in (*start, *concepts, *asked))
        first = first[: self._settings.first]
        sources = [known.tokens(word) for word in words] + [(id,) for id in known.words]
        first += self._new(
            self._random(sources) for _ in range(max(0, self._settings.first - len(first)))
        )
        self._score(first)

    def round(self) -> None:
        """Make and score new prompts, and score the most promising ones again."""
        self._score(self._children())

    def best(self, count: int) -> list[Candidate]:
        """Return the best prompts that differ from each other; the best first."""
        return _distinct(self._ranked(self.candidates), count)

    def add_full(self, candidates: Sequence[Candidate], count: int) -> None:
        """Score `count` more full pictures of each, of seeds that were never used."""
        self._add(candidates, count, steps=self._settings.steps)

    def _score(self, new: Sequence[Candidate]) -> None:
        settings = self._settings
        self._add(new, settings.cheap, steps=settings.cheap_steps)
        new = [candidate for candidate in new if candidate.cheap]
        self.candidates += new
        self.add_full(self._ranked(new)[: settings.promoted], settings.full)
        best = _distinct(self._ranked(self.candidates), len(self.candidates))
        leaders = [candidate for candidate in best if len(candidate.full) < settings.enough]
        self.add_full(leaders[: settings.leaders], 2 * settings.full)

    def _add(self, candidates: Sequence[Candidate], count: int, *, steps: int) -> None:
        seeds = list(itertools.islice(self._seeds, count))  # the same for all candidates
        pictures = [(candidate.text, seed) for candidate in candidates for seed in seeds]
        of = [candidate for candidate in candidates for _ in seeds]
        for candidate, score in zip(of, self._judge(pictures, steps), strict=False):
            scores = candidate.full if steps == self._settings.steps else candidate.cheap
            scores.append(score)

    def _ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        means = [candidate.mean for candidate in self.candidates]
        prior = float(np.mean(means)) if means else 0.0
        return sorted(candidates, key=lambda c: c.estimate(prior), reverse=True)

    def _new(self, made: Iterator[Tokens]) -> list[Candidate]:
        """Return the prompts among token sequences that are new."""
        new = []
        for tokens in made:
            prompt = self._vocabulary.prompt(tokens)
            if prompt is not None and prompt[0] not in self._seen:
                self._seen.add(prompt[0])
                new.append(Candidate(*prompt, self._embed(prompt[0])))
        return new

    def _random(self, sources: Sequence[Tokens]) -> Tokens:
        """Return one to six of the sources' sequences or of all tokens, joined."""
        parts = [
            sources[int(self._rng.integers(len(sources)))]
            if self._rng.random() < 0.8
            else (self._pick(self._vocabulary.ids),)
            for _ in range(self._rng.integers(1, 7))
        ]
        return tuple(itertools.chain(*parts))

    def _children(self) -> list[Candidate]:
        settings = self._settings
        parents = _distinct(self._ranked(self.candidates), settings.parents)
        made = self._new(self._child(parents) for _ in range(settings.proposals))
        hopes = _hopes(self.candidates, made)
        order = [made[index] for index in np.argsort(-hopes, kind="stable")]
        chosen = _distinct(order, settings.children * 3 // 4)
        others = [candidate for candidate in order if candidate not in chosen]
        self._rng.shuffle(others)  # some children are drawn against the model's advice
        drawn = settings.children - len(chosen)
        self._seen -= {candidate.text for candidate in others[drawn:]}
        return chosen + others[:drawn]

    def _child(self, parents: Sequence[Candidate]) -> Tokens:
        def parent() -> list[int]:  # the best of three: parents are ranked
            return list(parents[min(self._rng.integers(len(parents), size=3))].tokens)

        tokens = parent()
        if self._rng.random() < 0.35:
            other = parent()
            cut, begin = self._rng.integers(len(tokens) + 1), self._rng.integers(len(other) + 1)
            tokens = tokens[:cut] + other[begin:]
        for _ in range(self._rng.integers(1, 4)):
            tokens = self._mutated(tokens, parent())
        return tuple(tokens)

    def _mutated(self, tokens: list[int], other: Sequence[int]) -> list[int]:
        place = int(self._rng.integers(len(tokens) + 1))
        kind = self._rng.choice(["replace", "insert", "delete", "swap", "repeat"])
        before, after = tokens[:place], tokens[place:]
        if kind == "insert" or len(tokens) < 2:
            return [*before, self._token(other), *after]
        if kind == "replace":
            return [*before, self._token(other), *after[1:]]
        if kind == "delete":
            return before + after[1:]
        if kind == "swap":
            return [*before[:-1], *after[:1], *before[-1:], *after[1:]]
        return before + after[:2] + after

    def _token(self, other: Sequence[int]) -> int:
        """Draw a token of another good prompt, a whole word, or any token."""
        sources = (other, self._vocabulary.words or self._vocabulary.ids, self._vocabulary.ids)
        return self._pick(sources[self._rng.choice(3, p=[0.4, 0.4, 0.2])])

    def _pick(self, tokens: Sequence[int]) -> int:
        return tokens[int(self._rng.integers(len(tokens)))]


def _hopes(seen: Sequence[Candidate], made: Sequence[Candidate]) -> NDArray[np.float64]:
    """Return the score that each new prompt may have: mean plus deviation of a Gaussian process."""
    if not made:
        return np.zeros(0)
    seen = sorted(seen, key=lambda c: c.mean, reverse=True)[:300] + list(seen[-300:])
    seen = list(dict.fromkeys(seen))
    scores = np.array([candidate.mean for candidate in seen])
    texts = np.stack([c.embedding for c in (*seen, *made)]).astype(np.float64)
    lengths = (texts**2).sum(axis=1)
    distances = np.maximum(lengths[:, None] + lengths - 2 * texts @ texts.T, 0)
    near = np.exp(-distances / (np.median(distances) or 1.0))
    known, across = near[: len(seen), : len(seen)], near[len(seen) :, : len(seen)]
    noise = np.array([1 / candidate.weight for candidate in seen])  # of a picture: the prior's
    solved = np.linalg.solve(known + np.diag(noise), np.c_[scores - scores.mean(), across.T])
    left = np.maximum(1 - (across * solved[:, 1:].T).sum(axis=1), 0)  # of the prior's variance
    hopes: NDArray[np.float64] = across @ solved[:, 0] + 0.5 * scores.std() * np.sqrt(left)
    return hopes


def _distinct(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the first `count` candidates that are not similar to one before them."""
    chosen: list[Candidate] = []
    for candidate in candidates:
        if len(chosen) == count:
            break
        if all(_overlap(candidate, other) <= _SIMILAR for other in chosen):
            chosen.append(candidate)
    return chosen


def _overlap(one: Candidate, other: Candidate) -> float:
    """Return the part of two prompts' tokens, each once, that both have."""
    ours, theirs = set(one.tokens), set(other.tokens)
    return len(ours & theirs) / len(ours | theirs)
