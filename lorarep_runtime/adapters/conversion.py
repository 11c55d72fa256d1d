"""Adapters whose weights are pickled (PEFT before 0.5), made into those that are served, for operators alone."""

from __future__ import annotations

import json
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorarep_runtime.adapters import pickled_weights
from lorarep_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_config
from lorarep_runtime.adapters.peft_fields import check_fields
from lorarep_runtime.device.process import end_process, start_process
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.hub.files import TOKENIZER_FILES
from lorarep_runtime.hub.snapshot import Snapshot, fetch
from lorarep_runtime.progress import Progress

PICKLED_FILE = "adapter_model.bin"
SECONDS = 300.0
"""Most processor time in which weights are rewritten."""
MEMORY, COPIES = 1 << 30, 4
"""Most memory for that: these bytes, and so many times the file."""


def convert(
    source: str, revision: str | None, out: Path, cache_dir: Path | None, progress: Progress | None = None
) -> Snapshot:
    """Writes a folder with an adapter's config and tokenizer, and its pickled weights as safetensors.

    The weights are read in a process of its own, with limits of time and memory, and nothing in them is called.

    Args:
        source, revision, cache_dir, progress: as for `hub.snapshot.fetch`.
        out: the folder, which may be there if it is empty. It appears whole or not at all.

    Returns:
        Where the adapter came from.

    Raises:
        InvalidArgument: the folder is there and not empty, or is a link, or "." or "..".
        FailedPrecondition: the config is not of an adapter that could be served, or the weights are not tensors alone,
            or take too much memory or time.
        LorarepError: as `hub.snapshot.fetch`.
    """
    if out.is_symlink() or out.name in ("", ".."):
        raise InvalidArgument(
            f"{str(out)!r} is a link, or has no name of its own: give the path of a new folder", field="out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{str(out)!r} is there already, and not an empty folder", field="out")
    snapshot = fetch(source, revision, kind="pickled", cache_dir=cache_dir, progress=progress, look=_FieldsLook())
    with _appearing(out) as folder:
        _rewrite(snapshot.folder / PICKLED_FILE, folder / WEIGHTS_FILE)
        for pattern in (CONFIG_FILE, *TOKENIZER_FILES):
            for file in snapshot.folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    return snapshot


class _FieldsLook:
    """The look at an adapter of any base: at the fields of its config."""

    def config(self, folder: Path) -> int:
        check_fields(read_config(folder / CONFIG_FILE))
        return 0

    def header(self, file: Path) -> None:
        """Pickles have none."""


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that is moved to a path at the end, and removed if the end is an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex}")
    folder.mkdir()
    try:
        yield folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _rewrite(file: Path, out: Path) -> None:
    most_bytes = MEMORY + COPIES * file.stat().st_size
    process = start_process(pickled_weights.__name__, "rewrite", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps([str(file.absolute()), str(out), SECONDS, most_bytes]).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        code = process.wait()
    finally:
        end_process(process)
    if not answer:
        reason = f"takes over {SECONDS:g} s" if code == -signal.SIGPROF else f"its process ended with {code}"
        raise FailedPrecondition(f"{reason}, within {most_bytes} bytes", field=file.name)
    if refused := json.loads(answer):
        raise FailedPrecondition(refused, field=file.name)
