"""Which of two texts is better: the pairwise loss of Bradley & Terry (1952), as in Ouyang et al.
(2022) and in trl's RewardTrainer.

N: labels, two a pair   D: pairs
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.pack import Pack


def label_losses(logits_N1: Tensor, pack: Pack, config: HeadConfig, training: bool) -> Tensor:
    """loss_N in nats: -log sigmoid(chosen - rejected), and in training c (chosen + rejected)^2
    (Eisenstein et al., 2023, eq. 2), at both labels of a pair.

    A label's target is the sign of its reward in the difference.
    """
    reward_N, documents_N = logits_N1.squeeze(-1), pack.label_sequence_N
    none_D = reward_N.new_zeros(int(documents_N.max()) + 1)
    margin_D = none_D.index_add(0, documents_N, reward_N * pack.label_target_N)
    losses_D = -F.logsigmoid(margin_D)
    if training and config.center_rewards_coefficient:
        sum_D = none_D.index_add(0, documents_N, reward_N)
        losses_D = losses_D + config.center_rewards_coefficient * sum_D.square()
    return losses_D[documents_N]
