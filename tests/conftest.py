import ctypes
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.support.hub_faults import FaultyHub

# Before torch is imported: the workers share the cores, and so do the servers they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# All servers are on loopback, which a proxy for the package index cannot reach.
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else huggingface_hub, imported later, asks its own Hub about the caller

settings.register_profile("shared", deadline=None)  # how long an example takes depends on the other workers
settings.load_profile("shared")


try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    # Triton's kernels run on the CPU then. Before it is imported, as conftests of folders named on the command line do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: what waits for servers, deadlines and grace times keeps none busy."""
    return (os.cpu_count() or 1) + 1


def pytest_collectstart() -> None:
    """A driver is not yet a GPU. Not where tests are only handed out, nor in what a test starts: importing torch takes
    seconds."""
    if "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: no worker has it left when the others are done."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_soak.py"))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """Triton's looks through its whole language at every call of a function in a kernel, a third of all that it does.
    What it finds is the same each time."""
    if "triton" not in sys.modules or not os.environ.get("TRITON_INTERPRET"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # and not in its place already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """A Hub on loopback that `lorarep_runtime.hub.snapshot` is pointed at."""
    with FaultyHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
