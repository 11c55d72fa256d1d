import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.hub_faults import FaultyHub

# Before torch is imported: the workers share the cores, and so do the servers they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# All servers are on loopback, which a proxy for the package index cannot reach.
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else huggingface_hub, imported later, asks its own Hub about the caller

import torch

if not torch.cuda.is_available():
    # Before triton is imported: its kernels run on the CPU then.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("shared", deadline=None)  # how long an example takes depends on the other workers
settings.load_profile("shared")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """A Hub on loopback that `lorarep_runtime.hub` is pointed at."""
    with FaultyHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
