"""The process that reads pickled weights, of tensors alone, and writes them as safetensors, within limits."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from lorarep_runtime.device.process import end_with_parent, limit_memory


def rewrite() -> None:
    """Reads a line that says which file, where to, in which time and memory, and writes one that says what is wrong."""
    file, out, seconds, most_bytes = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr
    end_with_parent()
    import safetensors.torch  # noqa: F401  # only now: these take seconds, and memory that is not the file's
    import torch  # noqa: F401

    limit_memory(most_bytes)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
    answers.write(json.dumps(refusal(Path(file), Path(out))) + "\n")
    answers.flush()
    os._exit(0)


def refusal(file: Path, out: Path) -> str:
    """Writes the tensors of a pickled file as safetensors.

    Args:
        file: as `torch.save` writes a dict of tensors.
        out: to be written.

    Returns:
        Why nothing has been written; empty where that is not so.
    """
    import torch
    from safetensors.torch import save_file

    from lorarep_runtime.adapters.header import DTYPES

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)  # nothing of the file is called
        if not isinstance(found, dict) or not found:
            return f"holds {type(found).__name__}, and no tensors by their names"
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                return f"holds {type(tensor).__name__} by the name {str(name)[:80]!r}, and tensors by names are needed"
            if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
                return f"has {name[:80]!r} as {tensor.layout} of {tensor.dtype}; {', '.join(DTYPES)} are supported"
        # Each by itself: safetensors has no tensors that share memory.
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, out, {"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        out.chmod(0o666 & ~mask)  # safetensors lets the owner alone read it
    except Exception as error:  # of any class: the file is anybody's
        return f"cannot be read without running code of it, or does not fit: {str(error).strip().partition(chr(10))[0]}"
    return ""
