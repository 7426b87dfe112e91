"""Backbones by name, and the split of any classifier into backbone and head."""

from fastadvisor.models.build import build_model, check_model
from fastadvisor.models.split import Entering, SplitClassifier, cut_at, split
from fastadvisor.models.stages import Cut

__all__ = ["Cut", "Entering", "SplitClassifier", "build_model", "check_model", "cut_at", "split"]
