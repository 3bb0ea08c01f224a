"""Pictures as files: PNG with metadata, and the picture that shows where safety acted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, PngImagePlugin

_BLUR_SHARE = 1 / 12  # radius, of the shorter side: large shapes and colours stay, no detail

# IPTC's term for a picture made by a generative model; readers look for it in XMP.
_AI_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{_AI_SOURCE}"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""

# The names of our samplers in A1111's metadata.
_A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "lcm": "LCM",
    "unipc": "UniPC",
    "lms": "LMS",
}


def png_from_image(image: Image.Image, report: Mapping[str, Any] | None = None) -> bytes:
    """Encode a picture as PNG, with its report if there is one.

    Text chunks: `parameters` in A1111's format, `sld-edge` with the whole report as JSON, and XMP
    with IPTC's mark that the picture was made by a model.
    """
    info = PngImagePlugin.PngInfo()
    if report is not None:
        if "recipe" not in report:  # else the recipe was left out on purpose
            info.add_itxt("parameters", parameters_text(report))
        info.add_itxt("sld-edge", json.dumps(report, ensure_ascii=False))
    info.add_itxt("XML:com.adobe.xmp", _XMP)
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def parameters_text(report: Mapping[str, Any]) -> str:
    """Return the settings in A1111's format: prompt, negative prompt, one line of settings."""
    safety = report["safety"]
    settings = {
        "Steps": report["steps"],
        "Sampler": _A1111_SAMPLERS.get(report["sampler"], report["sampler"]),
        "CFG scale": f"{report['guidance_scale']:g}",
        "Seed": report["seed"],
        "Size": f"{report['width']}x{report['height']}",
        "Model hash": report["model_sha256"][:10],
        "Model": report["model"]["id"].replace(",", " ").replace(":", " "),
        "RNG": "CPU" if report["rng"] == "torch" else "NV",
        "SLD preset": safety["preset"],
        "SLD scale": f"{safety['scale']:g}",
        "AI generated": "yes",
        "Version": f"sld-edge {report['versions'].get('sld-edge', '')}".strip(),
    }
    lines = [report["prompt"]]
    if report["negative_prompt"]:
        lines.append(f"Negative prompt: {report['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def grey_from_edit_map(edit_map: NDArray[np.float32]) -> Image.Image:
    """Return an edit map, float32 [h,w], as 8-bit grey; its largest value is white.

    So grey shows the place of the edit and not its strength, which is in the report.
    """
    peak = float(edit_map.max(initial=0.0))
    heat = edit_map / peak if peak > 0 else np.zeros_like(edit_map)
    return Image.fromarray(np.round(heat * 255).astype(np.uint8))


def picture_with_heat(image: Image.Image, heat: Image.Image) -> Image.Image:
    """Draw where safety acted over the dimmed picture: dark red for little, yellow for most.

    `heat` is the output of `grey_from_edit_map`; it is stretched to the picture's size.
    """
    large = heat.resize(image.size, Image.Resampling.BICUBIC)
    alpha = np.asarray(large, np.float32)[..., None] / np.float32(255)
    colour = np.concatenate(
        [np.full_like(alpha, 255), 255 * np.clip(2 * alpha - 1, 0, 1) + 30, np.zeros_like(alpha)],
        axis=-1,
    )
    grey = np.asarray(image.convert("L"), np.float32)[..., None] * 0.7 + 40
    mixed = grey * (1 - alpha) + colour * alpha
    return Image.fromarray(np.clip(np.round(mixed), 0, 255).astype(np.uint8))


def psnr(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the peak signal-to-noise ratio of two pictures, 0 to 255, in dB; infinite if equal."""
    error = float(np.square(first.astype(np.float64) - second).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def blurred(image: Image.Image) -> Image.Image:
    """Return a picture of which only large shapes and colours remain."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * _BLUR_SHARE))
