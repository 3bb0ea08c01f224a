"""The error for NaN or infinity in the output of a graph."""

from __future__ import annotations

from sld_edge.engines.errors import NumericsError


def not_finite(component: str, *, precision: str, call: str = "") -> NumericsError:
    """Return an error that names the component, the call and a remedy.

    Args:
        component: the component with the output.
        precision: precision of its arithmetic, "fp16" or "fp32".
        call: "call 3 of 50", for a component that runs more than once.
    """
    if component == "guidance":
        advice = "lower the guidance scale or the safety scale"
    elif precision == "fp16":
        advice = f"it overflows in FP16: export again with --fp32-components {component}"
    else:
        advice = "its weights may be damaged: check the checkpoint, and export again"
    where = f" at {call}" if call else ""
    return NumericsError(f"{component}: NaN or infinity{where}, no image was made", do=advice)
