"""A class for each text, or several: transformers' ForSequenceClassificationLoss.

N: labels   D: documents   C: classes
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.objectives import token_classification
from llamaweft.model.pack import Pack


def label_losses(logits_NC: Tensor, pack: Pack, config: HeadConfig, training: bool) -> Tensor:
    """loss_N in nats: cross-entropy; where several classes may hold, binary cross-entropy of each
    class, the mean over them for each label of a document."""
    if not config.many:
        return token_classification.label_losses(logits_NC, pack, config, training)
    documents_N, target_N = pack.label_sequence_N, pack.label_target_N.long()
    holds_DC = logits_NC.new_zeros(int(documents_N.max()) + 1, config.outputs)
    holds_DC[documents_N[target_N >= 0], target_N[target_N >= 0]] = 1
    smoothing = config.label_smoothing if training else 0.0
    holds_NC = holds_DC[documents_N] * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits_NC, holds_NC, reduction="none").mean(-1)
