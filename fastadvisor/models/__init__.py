"""Classifiers by name, and the split of any classifier into backbone and head."""

from fastadvisor.models.build import build_model, check_model
from fastadvisor.models.split import EntryState, SplitClassifier, cut_at, is_plain_linear, layers_of, split
from fastadvisor.models.stages import Cut, Layer

__all__ = [
    "Cut",
    "EntryState",
    "Layer",
    "SplitClassifier",
    "build_model",
    "check_model",
    "cut_at",
    "is_plain_linear",
    "layers_of",
    "split",
]
