"""From a Stable Diffusion checkpoint to a bundle: builds the graphs without torch."""

from sld_edge.export.bundle import ExportSettings, export_bundle
from sld_edge.export.sources import checkpoint_from_source

__all__ = ["ExportSettings", "checkpoint_from_source", "export_bundle"]
