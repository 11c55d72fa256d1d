"""The sums of the ranks that share a model, by torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # another rank's process makes its channels before it imports torch
    import torch
    from torch import Tensor

PATIENCE = timedelta(minutes=5)
"""Time until a rank that waits for another one fails. One that has died is noticed earlier."""
LOCAL = {
    # All ranks are on one host, and nothing listens to other hosts.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # Multicast between GPUs is not to be had on every host.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    # Each process sees its own device alone, as the first.
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
}
"""Settings of the libraries, unless the environment has them."""


class Group:
    """This process's place among the ranks, of which there is one in a process. Makes torch's default process group.

    Raises:
        RuntimeError: the others do not come, or the process has a group already.
    """

    def __init__(self, rank: int, ranks: int, store: Path, device: torch.device) -> None:
        """
        Args:
            store: file by which the ranks find each other; none is there at first.
            device: where the tensors of this rank are.
        """
        import torch
        import torch.distributed as distributed

        self.rank, self.ranks = rank, ranks
        self._device = device
        self._distributed = distributed
        for name, value in LOCAL.items():
            os.environ.setdefault(name, value)
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=PATIENCE,
            # NCCL's communicator is made now, and not within a captured step.
            device_id=torch.device("cuda", device.index or 0) if device.type == "cuda" else None,
        )

    def add_up(self, x: Tensor) -> None:
        """Replaces a contiguous tensor, of which each rank has a term, by the sum. All ranks get the same bits.

        Raises:
            RuntimeError: a rank does not take part.
        """
        if self._device.type == "cuda" or self.ranks == 2:
            self._distributed.all_reduce(x)
            return
        # gloo's order of a sum depends on the place in the tensor, so that a row's would depend on the rows before it.
        terms = [x.new_empty(x.shape) for _ in range(self.ranks)]
        self._distributed.all_gather(terms, x)
        x.copy_(terms[0])
        for term in terms[1:]:
            x.add_(term)

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        """On rank 0 the contiguous tensors, of one shape, of all ranks in their order; elsewhere none.

        Raises as `add_up`.
        """
        parts = None if self.rank else [x.new_empty(x.shape) for _ in range(self.ranks)]
        self._distributed.gather(x, parts, 0)
        return parts or []

    def share(self, x: Tensor) -> None:
        """Overwrites a contiguous tensor with rank 0's. Raises as `add_up`."""
        self._distributed.broadcast(x, 0)

    @property
    def name(self) -> Any:
        """By which torch's operators know the group."""
        whole: Any = self._distributed.group.WORLD
        return whole.group_name

    def close(self) -> None:
        """Leaves the group: sums that wait for others fail.

        A group of GPUs stays until the process ends. To leave it may take for ever where another rank has ended.
        """
        if self._device.type != "cuda":
            self._distributed.destroy_process_group()
