"""The demo as a newcomer runs it, and its models under PEFT over the same NF4 base."""

from __future__ import annotations

import re

import pytest
import torch
from lorarep_server.demo.run import LATE, LINES
from lorarep_server.demo.train import load
from lorarep_server.demo.voices import BASE, MODELS, VOICES, answer
from peft import PeftModel

from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.servers import lorarep


def test_the_demo_runs_to_its_end() -> None:
    ended = lorarep("demo")
    assert ended.returncode == 0, ended.stderr
    for line in LINES:
        assert all(answer(name, line) in ended.stdout for name in (BASE, *VOICES) if name != LATE)
    assert answer(LATE, LINES[-1]) in ended.stdout
    assert re.search(rf"meanwhile, {LATE} was loaded from demo/{LATE} at [0-9a-f]{{12}} in ", ended.stdout)
    assert re.search(r"total +[\d,]+\n", ended.stdout)
    assert "metrics at http://127.0.0.1:" in ended.stdout


@pytest.mark.parametrize("name", [BASE, *VOICES])
def test_the_demos_models_say_the_same_under_peft(name: str) -> None:
    model = load(nf4=True)
    if name != BASE:
        model = PeftModel.from_pretrained(model, MODELS / name)
    tokenizer = Tokenizer(MODELS / BASE)
    for line in LINES[-1:] if name == LATE else LINES:
        prompt = torch.tensor([tokenizer.encode(f"{line}\n")])
        tokens = model.generate(input_ids=prompt, max_new_tokens=96, do_sample=False, use_cache=False)
        assert tokenizer.decode(tokens[0, prompt.shape[1] :].tolist()) == answer(name, line)
