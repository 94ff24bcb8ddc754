"""The trainer class of each method, one object for the life of the process.

Stock nnU-Net imports the modules of ``nnUNet_extTrainer`` anew at each look-up and forgets them again, so a class
defined there would be another one each time and could not be pickled. These live here: the modules in trainers/ only
name them.
"""

from __future__ import annotations

from functools import cache

from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer


@cache
def pretraining_trainer(method: str) -> type[PretrainingTrainer]:
    """The trainer class of a method, named as ``TRAINERS`` says."""
    method_class = METHODS[method]
    body = {
        "method_class": method_class,
        "__module__": __name__,
        "__doc__": f"Pretraining with {method_class.title}: {method_class.citation}.",
    }
    return type(TRAINERS[method], (PretrainingTrainer,), body)


def __getattr__(name: str) -> type[PretrainingTrainer]:
    """Classes by their name: this is how pickle finds them, in another process too."""
    for method, trainer in TRAINERS.items():
        if trainer == name:
            return pretraining_trainer(method)
    raise AttributeError(f"module {__name__} has no trainer {name}")
