"""Register methods: a file and a line here each."""

from nnssl_ext.catalog import trainer_of
from nnssl_ext.methods.base import DataGeometry, Method, OptimizerRecipe, ParameterGroup, Readable
from nnssl_ext.methods.contrastive_predictive_coding import ContrastivePredictiveCoding
from nnssl_ext.methods.dino.dino import DINO
from nnssl_ext.methods.exemplar import Exemplar
from nnssl_ext.methods.jigsaw import Jigsaw
from nnssl_ext.methods.masked_autoencoder import MaskedAutoencoder
from nnssl_ext.methods.models_genesis import ModelsGenesis
from nnssl_ext.methods.relative_patch_location import RelativePatchLocation
from nnssl_ext.methods.rotation import Rotation
from nnssl_ext.methods.variable_dimension_transform import VariableDimensionTransform
from nnssl_ext.methods.volume_fusion import VolumeFusion
from nnssl_ext.settings import FinetuneSettings

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        VolumeFusion,
        MaskedAutoencoder,
        ModelsGenesis,
        ContrastivePredictiveCoding,
        Rotation,
        Jigsaw,
        RelativePatchLocation,
        Exemplar,
        VariableDimensionTransform,
        DINO,
    )
}

#: Settings of each section in the plans: one per method, and the fine-tuner's.
SCHEMAS: dict[str, type] = {name: method.Settings for name, method in METHODS.items()}
SCHEMAS["finetune"] = FinetuneSettings

#: The trainer of each method, which stock's ``-tr`` names.
TRAINERS: dict[str, str] = {name: trainer_of(method.title) for name, method in METHODS.items()}

__all__ = [
    "METHODS",
    "SCHEMAS",
    "TRAINERS",
    "DataGeometry",
    "Method",
    "OptimizerRecipe",
    "ParameterGroup",
    "Readable",
]
