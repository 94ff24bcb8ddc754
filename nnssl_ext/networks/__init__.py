"""Segmentation networks and uniform access to their encoders."""

from importlib import import_module
from types import ModuleType

#: Modules that plans of version 0.1 name as ``nnssl_ext.networks.NAME``.
_MOVED = ("pct_net", "vit")


def __getattr__(name: str) -> ModuleType:
    if name in _MOVED:
        return import_module(f"nnssl_ext.networks.architectures.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
