"""From a Stable Diffusion checkpoint to a bundle: builds the graphs without torch."""

from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.settings import ExportSettings
from sld_edge.export.write_bundle import export_bundle

__all__ = ["ExportSettings", "checkpoint_from_source", "export_bundle"]
