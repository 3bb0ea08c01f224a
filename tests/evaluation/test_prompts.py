"""Prompt lists of every form, and what is said of a broken one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from sld_edge.benchmarks.evaluation.prompts import (
    EvalPrompt,
    chosen,
    fitted_sizes,
    prompt_from_json,
    read_prompts,
)
from sld_edge.benchmarks.miniworld.prompt_list import PATH, prompt_list_csv
from sld_edge.benchmarks.miniworld.world import COLOURS, SHAPES
from sld_edge.engines.errors import InputError

I2P = Path(__file__).parents[3] / "shared" / "data" / "i2p.csv"


def written(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


HERE = (
    ",prompt,categories,hard,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height\n"
    '0,"a, b","hate, self-harm",1,4261553411,13,512,384\n'
)
HUB = (
    "prompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
    '"a, b","hate, self-harm",1.0,4261553411.0,13.0,512,384\n'
)


@pytest.mark.parametrize("text", [HERE, HUB], ids=["repository", "hub"])
def test_both_column_namings_of_i2p(tmp_path: Path, text: str) -> None:
    (prompt,) = read_prompts(written(tmp_path, "i2p.csv", text)).prompts
    assert prompt == EvalPrompt(
        index=0,
        text="a, b",
        categories=("hate", "self-harm"),
        hard=True,
        seed=4261553411,
        guidance_scale=13.0,
        width=512,
        height=384,
    )
    assert prompt_from_json(asdict(prompt)) == prompt


def test_a_manifest_without_negative_prompts_is_read() -> None:
    prompt = EvalPrompt(index=3, text="a", negative_prompt="b")
    assert prompt_from_json(asdict(prompt)) == prompt
    older = {key: value for key, value in asdict(prompt).items() if key != "negative_prompt"}
    assert prompt_from_json(older) == EvalPrompt(index=3, text="a")
    with pytest.raises(ValueError, match="not the fields"):
        prompt_from_json({**older, "other": 1})


@pytest.mark.skipif(not I2P.exists(), reason="I2P's CSV is not here")
def test_i2p_itself() -> None:
    found = read_prompts(I2P)
    assert len(found.prompts) == 4703
    assert len({prompt.text for prompt in found.prompts}) == 4467
    assert found.prompts[2260].text == ""
    assert sum(prompt.hard is True for prompt in found.prompts) == 1831
    assert sum("sexual" in prompt.categories for prompt in found.prompts) == 931
    assert [prompt.index for prompt in found.prompts] == list(range(4703))
    assert any(note.startswith("236 of 4703 prompts repeat") for note in found.notes)
    assert any(note.startswith("1 of 4703 prompts are empty") for note in found.notes)


def test_a_csv_with_nothing_but_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "own.csv", '\ufeffid,Prompt\n7,"two\nlines"\n8,""\n\n9,plain\n')
    texts = [prompt.text for prompt in read_prompts(path).prompts]
    assert texts == ["two\nlines", "", "plain"]


def test_json_lines(tmp_path: Path) -> None:
    text = '{"prompt": "a", "categories": ["x", "y"], "seed": 5}\n\n{"prompt": "b", "hard": false}'
    first, second = read_prompts(written(tmp_path, "p.jsonl", text)).prompts
    assert (first.categories, first.seed, second.hard, second.seed) == (("x", "y"), 5, False, None)


def test_text_keeps_empty_lines_and_odd_separators(tmp_path: Path) -> None:
    found = read_prompts(written(tmp_path, "p.txt", "a\u2028b\r\n\r\nc\n"))
    assert [prompt.text for prompt in found.prompts] == ["a\u2028b", "", "c"]
    assert found.notes == ("1 of 3 prompts are empty; they are kept",)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "text\na\n", r"has no column prompt \| got text"),
        ("p.csv", "", "has no column prompt"),
        ("p.csv", "prompt\n", "no prompts in"),
        ("p.csv", "prompt,seed\na,1\nb\n", r"line 3, is broken \| got 1 fields \| expected 2"),
        ("p.csv", 'prompt,seed\na,1\n"b,2\n', "line 3, is broken"),
        ("p.csv", "prompt,seed\na,1\nb,4294967296\n", "line 3, seed .* from 0 to 4294967295"),
        ("p.csv", "prompt,seed\na,-1\n", "line 2, seed"),
        ("p.csv", "prompt,seed\na,1.5\n", "line 2, seed"),
        ("p.csv", 'prompt,seed\n"a\nb",1\nc,x\n', "line 4, seed"),
        ("p.csv", "prompt,guidance\na,nan\n", "line 2, guidance .* a number, 0 or more"),
        ("p.csv", "prompt,width\na,0\n", "line 2, width"),
        ("p.csv", "prompt,hard\na,maybe\n", r"line 2, hard .* expected 0 or 1"),
        ("p.csv", b"prompt\na\n\xff\xfe\n", "line 3, is not UTF-8"),
        ("p.txt", "", "no prompts in"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2, is not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1, is not JSON"),
        ("p.jsonl", '{"text": "a"}', "line 1 "),
        ("p.jsonl", '{"prompt": 3}', "line 1 "),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1, seed"),
        ("p.jsonl", '{"prompt": "a", "categories": 3}', "line 1, categories"),
        ("p.jsonl", r'{"prompt": "\ud800"}', "not valid Unicode"),
    ],
)
def test_what_is_broken_is_named_in_one_line(
    tmp_path: Path, name: str, text: str | bytes, said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_prompts(tmp_path / "none.csv")


LIST = tuple(
    EvalPrompt(index=index, text=str(index), categories=categories, hard=index % 2 == 1)
    for index, categories in enumerate([("a",), ("b",), ("A", "b"), ("c",), (), ("a",)])
)


def test_categories_and_hard_choose() -> None:
    assert [p.index for p in chosen(LIST, categories=["A"])] == [0, 2, 5]
    assert [p.index for p in chosen(LIST, categories=["a", "c"], hard=True)] == [3, 5]


def test_an_unknown_category_lists_those_there() -> None:
    with pytest.raises(InputError, match=r"got 'd' \| expected one of A, a, b, c"):
        chosen(LIST, categories=["d"])


def test_a_sample_is_in_order_without_repeats_and_follows_its_seed() -> None:
    many = [EvalPrompt(index=index, text="") for index in range(100)]
    first = [p.index for p in chosen(many, sample=20, sample_seed=1)]
    assert first == sorted(set(first))
    assert len(first) == 20
    assert first == [p.index for p in chosen(many, sample=20, sample_seed=1)]
    assert first != [p.index for p in chosen(many, sample=20, sample_seed=2)]


def test_a_sample_or_choice_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"--sample \| got 7 \| expected from 1 to 6"):
        chosen(LIST, sample=7)
    with pytest.raises(InputError, match="no prompt is left"):
        chosen(LIST[:1], hard=True)


def test_odd_sizes_are_rounded_and_counted_or_refused() -> None:
    odd = [
        EvalPrompt(index=0, text="", width=510, height=512),
        EvalPrompt(index=1, text="", width=512, height=3),
        EvalPrompt(index=2, text="", width=512),
    ]
    fitted, changed = fitted_sizes(odd, multiple=8, strict=False)
    assert [(p.width, p.height) for p in fitted] == [(512, 512), (512, 8), (512, None)]
    assert changed == 2
    with pytest.raises(InputError, match="prompt 0, width .* got 510"):
        fitted_sizes(odd, multiple=8, strict=True)


def test_the_shipped_list_is_what_its_code_makes() -> None:
    assert PATH.read_text(encoding="utf-8") == prompt_list_csv()


def test_the_shipped_list_is_read_as_i2p_is() -> None:
    found = read_prompts(PATH)
    assert found.notes == ()  # none empty, none twice
    counts = {word: 0 for prompt in found.prompts for word in prompt.categories}
    for prompt in found.prompts:
        (word,) = prompt.categories
        counts[word] += 1
        assert prompt.hard is (word in ("party", "alley", "midnight"))
        assert prompt.shape in SHAPES
        assert prompt.colour in COLOURS
        assert f" {prompt.colour} {prompt.shape} " in prompt.text
    assert counts == {
        "alley": 20,
        "party": 20,
        "midnight": 20,
        "meadow": 4,
        "beach": 4,
        "snow": 4,
        "plain": 18,
    }
    assert len({prompt.seed for prompt in found.prompts}) == 90
