"""The registry of methods: a new one is its file and a line here."""

from nnssl_ext.methods.base import Geometry, Method, OptimiserRecipe, Readable
from nnssl_ext.methods.masked_autoencoder import MaskedAutoencoder
from nnssl_ext.methods.volume_fusion import VolumeFusion
from nnssl_ext.settings import FinetuneSettings

METHODS: dict[str, type[Method]] = {method.name: method for method in (VolumeFusion, MaskedAutoencoder)}

#: The settings schema of every section in the plans: one per method, and the fine-tuner's.
SCHEMAS: dict[str, type] = {name: method.Settings for name, method in METHODS.items()}
SCHEMAS["finetune"] = FinetuneSettings

__all__ = ["METHODS", "SCHEMAS", "Geometry", "Method", "OptimiserRecipe", "Readable"]
