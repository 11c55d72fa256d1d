"""Log-probabilities of a prompt's own tokens, computed on the device with the prompt.

The scheduler bounds the tokens of a step whose logits are wanted, so that no tensor has all logits of a long prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorarep_runtime.device.staging import moved
from lorarep_runtime.request import PromptLogprobs

LOGITS_BYTES = 128 << 20
"""Most bytes of the fp32 logits of a step's prompts. Their log-probabilities take as many again for a moment."""


def most_rows(vocab_size: int) -> int:
    """Most tokens in one step of prompts whose log-probabilities are wanted."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def score(logits: Tensor, tokens: Sequence[int], top: int) -> PromptLogprobs:
    """The log-probabilities of a prompt's tokens. Waits for the device.

    Args:
        logits: (n, vocab) fp32, of the token before each.
        tokens: n of them.
        top: number of the likeliest tokens to report with each.
    """
    chosen = moved(torch.tensor(tokens, dtype=torch.int64), logits.device).unsqueeze(1)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, chosen)
    ranks = (logprobs > own).sum(-1) + 1
    best = logprobs.topk(max(top, 1))
    # The greatest is NaN where any logit of the row is NaN or infinite.
    own = own.squeeze(1).masked_fill(~best.values[:, 0].isfinite(), math.nan)
    return PromptLogprobs(
        chosen.squeeze(1).cpu().numpy(),
        own.cpu().numpy(),
        ranks.cpu().numpy(),
        best.indices[:, :top].cpu().numpy(),
        best.values[:, :top].cpu().numpy(),
    )
