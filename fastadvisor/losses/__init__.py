"""Losses as pure functions: from logits and labels to one loss for each sample. See README.md in this folder."""

from fastadvisor.losses.balanced_softmax import balanced_softmax
from fastadvisor.losses.class_balanced import class_balanced_weights
from fastadvisor.losses.early_learning import early_learning, updated_targets
from fastadvisor.losses.focal import focal
from fastadvisor.losses.ldam import ldam, margins
from fastadvisor.losses.logit_adjustment import logit_adjustment, post_hoc
from fastadvisor.losses.superloss import superloss

__all__ = [
    "balanced_softmax",
    "class_balanced_weights",
    "early_learning",
    "focal",
    "ldam",
    "logit_adjustment",
    "margins",
    "post_hoc",
    "superloss",
    "updated_targets",
]
