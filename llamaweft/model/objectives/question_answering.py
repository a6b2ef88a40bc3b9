"""Where in a text an answer begins and ends, as transformers' ForQuestionAnsweringLoss.

N: labels   T: tokens
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.pack import Pack


def label_losses(logits_T2: Tensor, pack: Pack, config: HeadConfig, training: bool) -> Tensor:
    """loss_N in nats: cross-entropy over the places of a document, for either end.

    label_smoothing: in training only, over the places of the document.
    """
    found_N = logits_T2.new_zeros(len(pack.label_target_N))
    smoothing = config.label_smoothing if training else 0.0
    starts = [0, *accumulate(pack.lengths)]
    for label, (place, side) in enumerate(
        zip(pack.label_position_N.tolist(), pack.label_target_N.long().tolist(), strict=True)
    ):
        segment = int(pack.segment_T[place])
        of_document = logits_T2[starts[segment] : starts[segment + 1], side]
        target = torch.tensor([place - starts[segment]], device=logits_T2.device)
        found_N[label] = F.cross_entropy(of_document[None], target, label_smoothing=smoothing)
    return found_N
