"""A number for each text: the squared error, as transformers' ForSequenceClassificationLoss.

N: labels
"""

from __future__ import annotations

from torch import Tensor

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.pack import Pack


def label_losses(logits_N1: Tensor, pack: Pack, config: HeadConfig, training: bool) -> Tensor:
    """loss_N, in the square of the label's unit."""
    return (logits_N1.squeeze(-1) - pack.label_target_N).square()
