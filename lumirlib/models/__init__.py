"""Networks: from a pair of images to a displacement."""

from lumirlib.models.backbone import Fields, RegistrationNetwork

__all__ = ["Fields", "RegistrationNetwork"]
