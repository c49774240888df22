"""Networks."""

from mnops.models.mobilenet import MobileNet

__all__ = ["MobileNet"]
