"""Networks."""

from mnops.models.convert import convert
from mnops.models.mobilenet import STAGES, VARIANTS, EndPoint, Layer, MobileNet

__all__ = ["STAGES", "VARIANTS", "EndPoint", "Layer", "MobileNet", "convert"]
