"""`sld-export` from end to end, and in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.models import save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.export.commands.export import main
from sld_edge.runtime.bundle import Bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_diffusers_directory(root, "sd2", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "tokenizer", pad="!")
    return root


def interpreter(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees this checkout."""
    paths = os.pathsep.join([str(ROOT / ".namespace"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_directory_to_bundle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    arguments = ["--model", str(folder), "--output", str(output), "--preset", "max"]
    options = ["--attention", "decomposed", "--width", "64", "--safety-concept", "a cat"]
    options += ["--fp32-components", "vae_decoder", "text_encoder"]
    assert main([*arguments, *options]) == 0
    manifest = Bundle.open(output).manifest
    assert manifest.defaults.safety == "max"
    assert manifest.prediction_type == "v_prediction"
    assert manifest.defaults.sampler == "ddim"
    unet = manifest.components["unet"]
    assert (unet.precision, unet.attention, unet.opset) == ("fp16", "decomposed", 20)
    precisions = [manifest.components[name].precision for name in ("vae_decoder", "text_encoder")]
    assert precisions == ["fp32", "fp32"]
    said = capsys.readouterr()
    assert str(output) in said.out
    assert "MB in" in said.out
    assert "GiB" in said.out

    assert main([*arguments, "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "--force" in said.err

    assert main([*arguments, "--force", "--quiet"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("no-such-alias", [], "no model 'no-such-alias'"),
        ("no/such/directory", [], "no model"),
        ("pickled.ckpt", [], "is a pickle"),
        (".", [], "not a whole diffusers directory"),
        ("sd-1.5", ["--precision", "fp8"], "--precision | got 'fp8' | expected one of fp16, fp32"),
        ("sd-1.5", ["--fp32-components", "vae"], "fp32 component | got 'vae' | expected text_enc"),
        ("sd-1.5", ["--precision", "fp32", "--fp32-components", "unet"], "where all are"),
        ("sd-1.5", ["--preset", "extreme"], "preset | got 'extreme'"),
        ("sd-1.5", ["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        ("sd-1.5", ["--prediction-type", "x"], "prediction_type | got 'x'"),
        ("sd-1.5", [], "cannot get stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    model: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["--model", model, "--output", "out", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--model",
        "--output",
        "--precision",
        "--fp32-components",
        "--attention",
        "--via",
        "--verify",
    ):
        assert option in text


def test_export_loads_no_torch(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from sld_edge.export.commands.export import main
code = main(sys.argv[1:])
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
sys.exit(code)
"""
    done = interpreter(
        code, "--model", str(folder), "--output", str(tmp_path / "out"), "--safety-concept", "x"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("onnx", [], "export"),
        ("torch", ["--verify"], "torch"),
        ("diffusers", ["--via", "torch"], "torch"),
    ],
)
def test_a_missing_package_names_the_extra(
    package: str, options: list[str], extra: str, folder: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from sld_edge.export.commands.export import main
sys.exit(main(sys.argv[1:]))
"""
    done = interpreter(
        code, "--model", str(folder), "--output", str(tmp_path / "out"), "--quiet", *options
    )
    assert done.returncode == 2, done.stderr
    assert f'pip install "sld-edge[{extra}]"' in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("concept", ["", "  ", "<|endoftext|>"])
def test_a_safety_concept_that_says_nothing(
    concept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint")
    arguments = ["--model", model, "--output", str(tmp_path / "b"), "--safety-concept", concept]
    assert main([*arguments, "--safety-concept", "a skull", "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "says nothing to the model" in said.err
    assert list(tmp_path.iterdir()) == []
