"""Measures every goal for one H100, part by part, and prints the table of goals and figures.

    python -m benchmarks.gpu.table --json FILE [--parts files,decode,...] [--quantization nf4] [--folder DIR]
        [--layers 32] [--device cuda]

from the repository's root.

Each part is a process of its own, so that none finds memory or kernels of another. The file keeps the figures of each
part from then on. A run may be of some parts; the table has the figures of earlier runs too.

- files: a base with Mistral-7B's shape and adapters are made in the folder.
- decode: steps of 1 to 32 rows, checked; the device's idle time and its kernels at 8 and 32.
- peft: PEFT's steps on the same files; needs `decode` for its check.
- footprint: memory and loading.
- interference: how prompts, loads, long contexts and a thousand adapters slow streams down.
- drawn, interference-drawn: steps, and loads while streams decode, where tokens are drawn and not the likeliest.
- sweep: steps of 1 to 256 rows, and of 32 and 256 rows on 1 to as many adapters, for `benchmarks.gpu.plot`.
- offered: 1 to 512 requests at once, with and without LoRAs, for `benchmarks.gpu.plot`.
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

from benchmarks.gpu.goals import Figures, print_all
from benchmarks.gpu.models import add_file_options

SWEEP = "1,2,4,8,16,32,64,128,256"
PARTS: dict[str, list[str]] = {
    "files": ["models"],
    "decode": ["decode", "--timeline=8,32"],
    "peft": ["peft_steps"],
    "footprint": ["footprint"],
    "interference": ["interference"],
    "drawn": ["decode", "--name=drawn", "--cases=lora", "--temperature=0.8", "--timeline=8,32"],
    "interference-drawn": ["interference", "--name=interference-drawn", "--parts=loads", "--temperature=0.8"],
    "sweep": [
        "decode",
        "--name=sweep",
        "--cases=none,lora",
        f"--batches={SWEEP}",
        f"--distinct={SWEEP}",
        "--rows=32,256",
    ],
    "offered": ["load", "--name=offered", "--prompts=", f"--requests={SWEEP},512"],
    "peft-sweep": ["peft_steps", "--cases=lora", "--batches=2,4,16,64,128,256"],
}
FILES_ALONE = {"files"}
"""Parts without figures."""
SMALL: dict[str, list[str]] = {
    "decode": ["--batches=1,2", "--timeline="],
    "peft": ["--batches=1,2"],
    "interference": [
        "--streams=2",
        "--adapters=80",
        "--requests=40",
        "--prompt=256",
        "--long=1024",
        "--new-tokens=400",
    ],
    "drawn": ["--batches=1,2", "--timeline="],
    "interference-drawn": ["--streams=2", "--prompt=256", "--long=1024", "--new-tokens=400"],
    "sweep": ["--batches=1,2,4", "--distinct=1,2", "--rows=4"],
    "offered": ["--adapters=0,2"],
    "peft-sweep": ["--batches=4"],
}
"""More arguments of the parts on the CPU."""


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
    module, *arguments = PARTS[part]
    arguments += SMALL.get(part, []) if options.device == "cpu" else []
    arguments += [f"--folder={folder}", f"--layers={options.layers}", f"--device={options.device}"]
    if part not in FILES_ALONE:
        arguments += [f"--quantization={options.quantization}", f"--json={options.json}"]
    print(f"--- {part}", flush=True)
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", f"benchmarks.gpu.{module}", *arguments])
    print(f"--- {part}: {time.monotonic() - began:.0f} s\n", flush=True)
    return ended.returncode == 0


if __name__ == "__main__":
    main()
