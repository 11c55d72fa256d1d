"""One rank of a base that several devices share: what it holds, and how it adds up sums with the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorarep_runtime.device.group import Group
from lorarep_runtime.model.cut import Cut, cut_bias, cut_weight
from lorarep_runtime.model.linear import AddUp
from lorarep_runtime.model.weights import Weight


@dataclass(frozen=True)
class Shard:
    """What one rank computes of a base."""

    cut: Cut
    group: Group
    """Of the tensors that all ranks compute at the same time, in the same order."""

    def weight(self, module: str, whole: Weight, device: torch.device) -> Weight:
        """The rank's part of a weight, a copy on its device.

        Args:
            module: its path in the layer.
        """
        return cut_weight(whole, self.cut.part(module, whole.shape), device)

    def rest(self, module: str, linear: nn.Linear, device: torch.device) -> tuple[nn.Parameter | None, AddUp | None]:
        """The rank's part of a whole module's bias, and how its outputs become whole; None where they are."""
        part = self.cut.part(module, (linear.out_features, linear.in_features))
        return cut_bias(linear.bias, part, self.cut.rank, device), self.group.add_up if part.is_summed else None
