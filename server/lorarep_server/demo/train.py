"""Trains the demo's base and its adapters, with PEFT, into the folder that ships with the package.

    python -m lorarep_server.demo.train

The base learns to repeat a line of text. Each adapter learns a transformation of the line; an adapter with a
replication map learns it on its stack, on which the base alone cannot repeat a line. Each model takes minutes on two
cores. The same seeds on the same machine give the same files.
"""

from __future__ import annotations

import math
import shutil
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorarep_server.demo.voices import BASE, MODELS, VOICES, answer

PAD, BOS, EOS = 256, 257, 258
LONGEST = 32
"""Most characters of a line."""
BATCH = 64
IGNORED = -100
RANK = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT = 200
"""Number of lines that are checked. Their seed differs from that of the training lines."""
LETTERS = string.ascii_lowercase
OTHERS = string.ascii_letters + string.digits + "-.,!?'"
BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@dataclass(frozen=True)
class Course:
    """The length and the learning rate of a training."""

    steps: int
    """Optimizer steps."""
    rate: float
    """Largest learning rate."""


COURSE = Course(1500, 2e-3)


def save_tokenizer(folder: Path) -> None:
    """Saves a tokenizer with a token for each byte, and <pad>, <s> and </s>. A prompt begins with <s>."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab={**BYTES, **special}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def encode(text: str) -> list[int]:
    """The tokens that the tokenizer gives for ASCII text, without <s>."""
    return [BYTES["Ġ" if c == " " else "Ċ" if c == "\n" else c] for c in text]


class Lines:
    """A reproducible sequence of random lines of words."""

    def __init__(self, seed: int, letters: Sequence[str]) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._letters = letters

    def below(self, limit: int) -> int:
        """A random number from 0 to `limit` - 1."""
        return int(torch.randint(limit, (), generator=self._generator))

    def line(self, length: int) -> str:
        """A line of words of 1 to 9 letters, with about `length` letters and spaces."""
        letters = self._letters[self.below(len(self._letters))]
        words: list[str] = []
        while (left := length - len(" ".join(words))) > (1 if words else 0):
            size = min(1 + self.below(9), left)
            words.append("".join(letters[self.below(len(letters))] for _ in range(size)))
        return " ".join(words)[:length].strip() or letters[0]

    def batch(self, answer: Callable[[str], str], size: int) -> tuple[Tensor, Tensor]:
        """A batch of training examples.

        Returns:
            Tokens and labels, each (size, tokens) int64. Only tokens of answers have labels.
        """
        longest = 1 + self.below(LONGEST)
        rows, labels = [], []
        for _ in range(size):
            line = self.line(max(1, longest - self.below(4)))
            prompt, said = [BOS, *encode(line + "\n")], [*encode(answer(line)), EOS]
            rows.append(prompt + said)
            labels.append([IGNORED] * len(prompt) + said)
        width = max(map(len, rows))
        return tuple(  # type: ignore[return-value]
            torch.tensor([row + [fill] * (width - len(row)) for row in table])
            for table, fill in ((rows, PAD), (labels, IGNORED))
        )


def train(model: nn.Module, answer: Callable[[str], str], course: Course, lines: Lines) -> None:
    """Trains the parameters that require gradients, with AdamW, a short warm-up and a cosine to 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = course.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / course.steps)) / 2)
    )
    model.train()
    for step in range(course.steps):
        tokens, labels = lines.batch(answer, BATCH)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            click.echo(f"  step {step + 1}: loss {loss.item():.4f}")
    model.eval()


def load(*, nf4: bool) -> PreTrainedModel:
    """Loads the trained base in fp32, either its exact weights or their values after NF4 quantization."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        MODELS / BASE, dtype=torch.float32, quantization_config=quantization
    )
    return model.dequantize() if nf4 else model


@torch.inference_mode()
def right(model: nn.Module, says: Callable[[str], str]) -> float:
    """The fraction of held-out lines that greedy decoding answers exactly."""
    lines, correct = Lines(1, [LETTERS]), 0
    for _ in range(HELD_OUT // 10):
        tokens, labels = lines.batch(says, 10)
        chosen, expected = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1), labels[:, 1:]
        correct += int(((chosen == expected) | (expected == IGNORED)).all(1).sum())
    return correct / HELD_OUT


def train_base() -> None:
    """Trains the base, and saves it in fp16."""
    click.echo(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    train(model, lambda line: answer(BASE, line), Course(1500, 3e-3), Lines(0, [LETTERS, LETTERS, OTHERS]))
    folder = MODELS / BASE
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    save_tokenizer(folder)


def train_adapter(name: str) -> None:
    """Trains an adapter on the NF4-quantized base, and saves it in fp16."""
    click.echo(name)
    torch.manual_seed(0)
    voice = VOICES[name]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=LINEAR,
        use_dora=voice.dora,
        layer_replication=voice.layer_replication,
    )
    model = get_peft_model(load(nf4=True), config)
    train(model, voice.says, COURSE, Lines(0, [LETTERS]))
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = f"demo/{BASE}"
    # By default PEFT would ask the Hub whether the embeddings were resized.
    model.half().save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()


def check(name: str) -> None:
    """Prints the fraction of held-out lines that the saved model answers right."""
    parts = []
    for nf4 in (False, True):
        base = load(nf4=nf4)
        model = base if name == BASE else PeftModel.from_pretrained(base, MODELS / name)
        parts.append(right(model.eval(), lambda line: answer(name, line)))
    click.echo(f"{name}: right on {parts[0]:.1%} of held-out lines, {parts[1]:.1%} in NF4")


@click.command()
def main() -> None:
    """Train the demo's models."""
    train_base()
    check(BASE)
    for name in VOICES:
        train_adapter(name)
        check(name)


if __name__ == "__main__":
    main()
