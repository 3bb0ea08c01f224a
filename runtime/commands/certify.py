"""`sld-run --self-test` and `sld-run --certify`: checks of this machine.

The code that builds plans and that computes memory is in `export`, which this package does not
import: it runs in another process, which frees its memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sld_edge.engines.errors import EngineError, InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.engines.providers import choose
from sld_edge.runtime.commands.console import EXIT_FAILED, EXIT_OK
from sld_edge.runtime.commands.options import RunSettings
from sld_edge.runtime.loader import LoadSettings
from sld_edge.runtime.selftest import PASS, Budget, certificate_json, certify, self_test

# Options that would change what is certified.
_NOT_CERTIFIED = (
    *(
        "bundle",
        "engine",
        "trust_plan",
        "low_memory",
        "vae",
        "vae_tiling",
        "cuda_graph",
        "batch_size",
    ),
    *("safety", "sampler", "steps", "seed", "width", "height", "count"),
)
_MOST_MINUTES = 24 * 60


def run_self_test(settings: RunSettings) -> int:
    """Run the self-test of a provider; return the exit code."""
    name = settings.provider if settings.provider != "auto" else choose({})[0]
    passed = self_test(
        name,
        say=print,
        build=_build_plans,
        device=settings.device,
        cpu_precision=settings.cpu_precision,
    )
    return EXIT_OK if passed else EXIT_FAILED


def run_certify(settings: RunSettings, bundle: Path) -> int:
    """Certify this device with a bundle and write the certificate; return the exit code.

    Raises:
        UserError: wrong options, no such bundle, or a provider that does not work here.
    """
    if settings.report is None:
        raise InputError("--certify writes a file", do="add --report device.json")
    if settings.prompt:
        raise InputError("--certify makes its own pictures", do="leave the prompt out")
    for name in _NOT_CERTIFIED:
        if getattr(settings, name) != getattr(RunSettings, name):
            switch = "no-" if getattr(RunSettings, name) is True else ""
            option = f"--{switch}{name.replace('_', '-')}"
            raise InputError("--certify sets this itself", got=option, do="leave it out")
    if not 0 < settings.minutes <= _MOST_MINUTES:
        expected = f"above 0, to {_MOST_MINUTES}"
        raise InputError("--minutes", got=settings.minutes, expected=expected)
    check_writable(settings.report, force=settings.force)
    certificate = certify(
        bundle,
        settings=LoadSettings(
            provider=settings.provider,
            device=settings.device,
            cpu_precision=settings.cpu_precision,
        ),
        budget=Budget(60 * settings.minutes),
        say=print,
        compute=_computed_memory,
    )
    private = (bundle, bundle.resolve(), Path.home(), Path.cwd())
    write_whole(
        settings.report, certificate_json(certificate, private=private), replace=settings.force
    )
    print(f"{settings.report}: {certificate['verdict']}, in {certificate['seconds']:.0f} s")
    return EXIT_OK if certificate["verdict"] == PASS else EXIT_FAILED


def _computed_memory(bundle: Path, pixels: int) -> Mapping[str, Any]:
    """Compute the memory that a bundle needs, which needs onnx."""
    command = [sys.executable, "-m", "sld_edge.export.memory", str(bundle), str(pixels)]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineError("the computed memory is not known", got=reason)
    computed: dict[str, Any] = json.loads(process.stdout)
    return computed


def _build_plans(bundle: Path, flavour: str) -> None:
    """Build a bundle's plans for this device."""
    command = [sys.executable, "-m", "sld_edge.export.commands.build", str(bundle)]
    process = subprocess.run([*command, "--engine", flavour], check=False)
    if process.returncode != 0:
        raise EngineError(f"the plans for {flavour} could not be built, see above")
