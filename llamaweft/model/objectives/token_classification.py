"""A class for each word: cross-entropy, as transformers' ForTokenClassification.

N: labels   C: classes
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.pack import Pack


def label_losses(logits_NC: Tensor, pack: Pack, config: HeadConfig, training: bool) -> Tensor:
    """loss_N in nats. label_smoothing: in training only (Szegedy et al., 2016)."""
    return F.cross_entropy(
        logits_NC,
        pack.label_target_N.long(),
        reduction="none",
        label_smoothing=config.label_smoothing if training else 0.0,
    )
