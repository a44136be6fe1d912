"""PEFT methods: what of a model is tuned. One file a method, which registers itself and touches nothing else.

`method.py` is what a method is, `tuned.py` what becomes of a model under one; `tuners` has the methods that the Hugging
Face `peft` library builds.
"""

from fedpeft.peft.method import Method, MethodOptions, make, methods
from fedpeft.peft.tuned import TunedModel, arrays_of, count, spec_of, timm_spec, tune

__all__ = [
    "Method",
    "MethodOptions",
    "TunedModel",
    "arrays_of",
    "count",
    "make",
    "methods",
    "spec_of",
    "timm_spec",
    "tune",
]
