"""Networks."""

from mnops.models.convert import convert
from mnops.models.layers import STAGES, VARIANTS, EndPoint, Layer
from mnops.models.mobilenet import MobileNet

__all__ = ["STAGES", "VARIANTS", "EndPoint", "Layer", "MobileNet", "convert"]
