"""The measured process of a peer: makes one picture and notes when each step ended.

    python peer_worker.py versions|prepare|run TASK

This script imports nothing of sld-edge: a peer may be installed for another Python.
Memory is read from outside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

MARK = "sld-bench: "  # as in child.py
_GUIDANCE = 7.5

Make = Callable[[Callable[[], object]], Any]
"""Makes a picture (PIL); calls its argument after every step."""


def diffusers(task: dict[str, Any]) -> Make:
    """Load diffusers' pipeline, the safe one where the task has safety numbers."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipelineSafe

    safety = task["safety"]
    dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    if safety is None:  # the checkpoint names its class, for SDXL too
        pipeline = DiffusionPipeline.from_pretrained(task["model"], torch_dtype=dtype)
    else:
        pipeline = StableDiffusionPipelineSafe.from_pretrained(
            task["model"],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            torch_dtype=dtype,
        )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if safety is None:
        return lambda step: pipeline(**_diffusers_request(task, step)).images[0]
    pipeline.safety_concept = safety["concept"]

    def make(step: Callable[[], object]) -> Any:
        request = _diffusers_request(task, step)
        request.pop("callback_on_step_end")  # the safe pipeline has the older callback
        return pipeline(
            **request,
            sld_guidance_scale=safety["scale"],
            sld_warmup_steps=safety["warmup_steps"],
            sld_threshold=safety["threshold"],
            sld_momentum_scale=safety["momentum_scale"],
            sld_mom_beta=safety["momentum_beta"],
            callback=lambda *_: step(),
        ).images[0]

    return make


def optimum(task: dict[str, Any]) -> Make:
    """Load optimum-onnx's pipeline."""
    import onnxruntime
    from diffusers import DDIMScheduler
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    pipeline = ORTStableDiffusionPipeline.from_pretrained(
        task["prepared"], session_options=options, provider="CPUExecutionProvider"
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return lambda step: pipeline(**_diffusers_request(task, step)).images[0]


def prepare_optimum(task: dict[str, Any]) -> None:
    """Export the checkpoint with optimum's own exporter."""
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(dir=task["prepared"]) as folder:
        source = with_common_names(Path(task["model"]), Path(folder))
        main_export(str(source), output=task["prepared"], task="text-to-image", do_validation=False)


def openvino(task: dict[str, Any]) -> Make:
    """Load OpenVINO GenAI's pipeline, in float32 as the others or in its own precision."""
    import numpy as np
    import openvino
    import openvino_genai as genai
    from PIL import Image

    class Given(genai.Generator):
        """The noise that torch would draw."""

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.load(task["noise"]).reshape(list(shape)))

    folder = Path(task["prepared"])
    properties = {"INFERENCE_NUM_THREADS": task["threads"]}
    if task["precision"] == "fp32":
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    pipeline = genai.Text2ImagePipeline(folder)
    ddim = genai.Scheduler.from_config(
        folder / "scheduler" / "scheduler_config.json", genai.Scheduler.Type.DDIM
    )
    pipeline.set_scheduler(ddim)
    pipeline.reshape(1, task["size"], task["size"], _GUIDANCE)
    pipeline.compile("CPU", **properties)

    def make(step: Callable[[], object]) -> Any:
        def watch(_index: int, _count: int, _latent: Any) -> bool:
            step()
            return False  # go on

        tensor = pipeline.generate(
            task["prompt"],
            width=task["size"],
            height=task["size"],
            num_inference_steps=task["steps"],
            guidance_scale=_GUIDANCE,
            generator=Given(),
            callback=watch,
        )
        return Image.fromarray(np.array(tensor.data[0]))

    return make


def prepare_openvino(task: dict[str, Any]) -> None:
    """Convert the checkpoint's modules, named as OpenVINO GenAI expects them."""
    import openvino as ov
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from openvino_tokenizers import convert_tokenizer
    from transformers import CLIPTextModel, CLIPTokenizerFast

    folder = Path(task["prepared"])
    names = tempfile.TemporaryDirectory(dir=folder)
    source = with_common_names(Path(task["model"]), Path(names.name))

    class Decoder(torch.nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latent_sample: Any) -> Any:
            return self.vae.decode(latent_sample, return_dict=False)[0]

    class Text(torch.nn.Module):
        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any) -> Any:
            return self.encoder(input_ids, return_dict=False)[0]

    class UNet(torch.nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    unet = UNet2DConditionModel.from_pretrained(source / "unet").eval()
    cells, width = unet.config.sample_size, unet.config.cross_attention_dim
    text = CLIPTextModel.from_pretrained(source / "text_encoder", attn_implementation="eager")
    length = text.config.max_position_embeddings
    vae = AutoencoderKL.from_pretrained(source / "vae").eval()
    latents = torch.zeros(2, 4, cells, cells)
    modules: dict[str, tuple[Any, dict[str, Any], str]] = {
        "text_encoder": (
            Text(text.eval()),
            {"input_ids": torch.zeros(1, length, dtype=torch.int64)},
            "last_hidden_state",
        ),
        "unet": (
            UNet(unet),
            {
                "sample": latents,
                "timestep": torch.ones(1, dtype=torch.int64),
                "encoder_hidden_states": torch.zeros(2, length, width),
            },
            "out_sample",
        ),
        "vae_decoder": (Decoder(vae), {"latent_sample": latents[:1]}, "sample"),
    }
    for name, (module, example, output) in modules.items():
        with torch.no_grad():
            model = ov.convert_model(module, example_input=example)
        for tensor, key in zip(model.inputs, example, strict=True):
            tensor.get_tensor().set_names({key})
        model.outputs[0].get_tensor().set_names({output})
        (folder / name).mkdir()
        ov.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=False)
        part = "vae" if name == "vae_decoder" else name
        shutil.copy(source / part / "config.json", folder / name / "config.json")
    (folder / "tokenizer").mkdir()
    tokenizer = CLIPTokenizerFast.from_pretrained(source / "tokenizer")
    converted = convert_tokenizer(tokenizer, with_detokenizer=False)
    ov.save_model(converted, folder / "tokenizer" / "openvino_tokenizer.xml")
    shutil.copytree(source / "scheduler", folder / "scheduler")
    shutil.copy(source / "model_index.json", folder)
    names.cleanup()


def sdcpp(task: dict[str, Any]) -> Make:
    """Load stable-diffusion.cpp's model, in float32 as the others."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=task["prepared"], n_threads=task["threads"], wtype="f32", verbose=False
    )

    def make(step: Callable[[], object]) -> Any:
        def watch(index: int, count: int, _seconds: float) -> None:
            if index > 0 and count == task["steps"]:  # the decoder reports progress of its own
                step()

        return model.generate_image(
            prompt=task["prompt"],
            width=task["size"],
            height=task["size"],
            cfg_scale=_GUIDANCE,
            sample_steps=task["steps"],
            sample_method="ddim_trailing",
            seed=task["seed"],
            progress_callback=watch,
        )[0]

    return make


def prepare_sdcpp(task: dict[str, Any]) -> None:
    """Name the checkpoint's tensors as stable-diffusion.cpp knows them."""
    with_common_names(Path(task["model"]), Path(task["prepared"]))


def with_common_names(source: Path, folder: Path) -> Path:
    """Link a checkpoint's files into a folder; CLIP's tensors get the names that all peers know.

    transformers 5 writes the names without their prefix. Other programs then refuse the file, or
    go on with random numbers.
    """
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name != "text_encoder":
            (folder / path.name).symlink_to(path)
    (folder / "text_encoder").mkdir()
    shutil.copy(source / "text_encoder" / "config.json", folder / "text_encoder")
    name = "text_encoder/model.safetensors"
    with (source / name).open("rb") as read, (folder / name).open("wb") as written:
        (size,) = struct.unpack("<Q", read.read(8))
        head = json.loads(read.read(size))
        renamed = {
            key if key.startswith(("text_model.", "__")) else f"text_model.{key}": entry
            for key, entry in head.items()
        }
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)
        written.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(read, written)
    return folder


def _diffusers_request(task: dict[str, Any], step: Callable[[], object]) -> dict[str, Any]:
    import torch

    def watch(_pipeline: Any, _index: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        step()
        return kept

    return {
        "prompt": task["prompt"],
        "num_inference_steps": task["steps"],
        "guidance_scale": _GUIDANCE,
        "width": task["size"],
        "height": task["size"],
        "generator": torch.Generator().manual_seed(task["seed"]),
        "callback_on_step_end": watch,
    }


LOADERS = {"diffusers": diffusers, "optimum": optimum, "openvino": openvino, "sdcpp": sdcpp}
PREPARERS = {
    "optimum": prepare_optimum,
    "openvino": prepare_openvino,
    "sdcpp": prepare_sdcpp,
}


def run(task: dict[str, Any], begin: float) -> dict[str, Any]:
    """Load, make one picture, and return the measurements."""
    make = LOADERS[task["peer"]](task)
    ready, cpu = time.monotonic(), time.process_time()
    ends: list[float] = []
    picture = make(lambda: ends.append(time.monotonic()))
    done, cpu_done = time.monotonic(), time.process_time()
    if task["picture"] is not None:
        picture.convert("RGB").save(task["picture"])
    return {
        "phases": [
            {"name": "start", "begin": begin, "end": ready},
            {"name": "run", "begin": ready, "end": done},
        ],
        "steps_s": [after - before for before, after in pairwise(ends)],
        "image_s": done - ready,
        "image_cpu_s": cpu_done - cpu,
        "first_done": done,
    }


def versions(packages: list[str]) -> dict[str, str | None]:
    """Return the versions of packages; None for a package that is not installed."""
    installed: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def main(action: str, task: dict[str, Any]) -> dict[str, Any]:
    """Do an action and return its answer."""
    begin = time.monotonic()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if action == "versions":
        return dict(versions(task["packages"]))
    if action == "prepare":
        PREPARERS[task["peer"]](task)
        return {}
    return run(task, begin)


if __name__ == "__main__":
    # Libraries write to standard output too, C++ ones past Python; the answer has its own way.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    found = main(sys.argv[1], json.loads(sys.argv[2]))
    print(f"{MARK}{json.dumps(found)}", file=answer, flush=True)
    sys.stdin.read()
