"""Make the trainer class of each method, once per process.

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
    """Return a method's trainer class, named by ``TRAINERS``."""
    method_class = METHODS[method]
    body = {
        "method_class": method_class,
        "__module__": __name__,
        "__doc__": f"Pretraining with {method_class.title}: {method_class.citation}.",
    }
    return type(TRAINERS[method], (PretrainingTrainer,), body)


def __getattr__(name: str) -> type[PretrainingTrainer]:
    """Return a class by its name, as pickle asks for it."""
    for method, trainer in TRAINERS.items():
        if trainer == name:
            return pretraining_trainer(method)
    raise AttributeError(f"module {__name__} has no trainer {name}")
