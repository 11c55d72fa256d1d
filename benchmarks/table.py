"""Everything that is asked of one H100, measured part by part, and the table of what was asked and what was reached.

    python benchmarks/table.py --json FILE [--parts files,decode,...] [--quantization nf4] [--folder DIR] [--layers 32]
        [--device cuda]

Each part is a process of its own, so that none finds memory or kernels of another; what it measures is in the file from
then on. A run may be of some parts, with the figures of earlier ones in the file: the table has all of them.

- files: a base with Mistral-7B's shape and adapters are made in the folder.
- decode: steps of 1 to 32 rows, checked; the device's idle time and its kernels at 8 and 32.
- peft: PEFT's steps on the same files; needs `decode` for its check.
- footprint: memory and loading.
- beside: what streams notice of prompts, loads, long contexts and a thousand adapters.
- drawn, beside-drawn: steps, and loads beside streams, where tokens are drawn and not the likeliest.
- sweep: steps of 1 to 256 rows, and of 32 and 256 rows on 1 to as many adapters, for `benchmarks/plot.py`.
- peft-sweep: PEFT's steps of up to 256 rows.

`--device cpu --layers 4` does all of it with a small base, to see that it runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.goals import Figures, print_all
from benchmarks.models import add_file_options

HERE = Path(__file__).resolve().parent
SWEEP = "1,2,4,8,16,32,64,128,256"
PARTS: dict[str, list[str]] = {
    "files": ["models.py"],
    "decode": ["decode.py", "--timeline=8,32"],
    "peft": ["peft_steps.py"],
    "footprint": ["footprint.py"],
    "beside": ["beside.py"],
    "drawn": ["decode.py", "--name=drawn", "--cases=lora", "--temperature=0.8", "--timeline=8,32"],
    "beside-drawn": ["beside.py", "--name=beside-drawn", "--parts=loads", "--temperature=0.8"],
    "sweep": [
        "decode.py",
        "--name=sweep",
        "--cases=none,lora",
        f"--batches={SWEEP}",
        f"--distinct={SWEEP}",
        "--rows=32,256",
    ],
    "peft-sweep": ["peft_steps.py", "--cases=lora", "--batches=2,4,16,64,128,256"],
}
FILES_ALONE = {"files"}
"""Parts that measure nothing."""
SMALL: dict[str, list[str]] = {
    "decode": ["--batches=1,2", "--timeline="],
    "peft": ["--batches=1,2"],
    "beside": ["--streams=2", "--adapters=80", "--requests=40", "--prompt=256", "--long=1024", "--new-tokens=400"],
    "drawn": ["--batches=1,2", "--timeline="],
    "beside-drawn": ["--streams=2", "--prompt=256", "--long=1024", "--new-tokens=400"],
    "sweep": ["--batches=1,2,4", "--distinct=1,2", "--rows=4"],
    "peft-sweep": ["--batches=4"],
}
"""What they are given besides on the CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {sorted(unknown)} are none of {list(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        failed = [part for part in options.parts if not run(part, options, options.folder or Path(folder))]
    print_all(Figures(options.json))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(part: str, options: argparse.Namespace, folder: Path) -> bool:
    script, *arguments = PARTS[part]
    arguments += SMALL.get(part, []) if options.device == "cpu" else []
    arguments += [f"--folder={folder}", f"--layers={options.layers}", f"--device={options.device}"]
    if part not in FILES_ALONE:
        arguments += [f"--quantization={options.quantization}", f"--json={options.json}"]
    print(f"--- {part}", flush=True)
    began = time.monotonic()
    ended = subprocess.run([sys.executable, str(HERE / script), *arguments])
    print(f"--- {part}: {time.monotonic() - began:.0f} s\n", flush=True)
    return ended.returncode == 0


if __name__ == "__main__":
    main()
