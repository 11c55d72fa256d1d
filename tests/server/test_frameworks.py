"""Frameworks of applications, lm-evaluation-harness and guidellm, as they are published, against the real server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lorarep.v1 import generation_pb2 as pb
from transformers import AutoTokenizer

from tests.server.test_clients import CLIENTS, NODE
from tests.support.callers import request
from tests.support.models import load_base, reference_logits
from tests.support.servers import SECONDS, Server
from tests.support.world import World

PYTHON = CLIENTS / ".venv/bin/python"
QUESTION = "The capital of France"
MODEL = "dora"
"""An adapter with a chat template."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def printed(*command: str | Path, **env: str) -> Any:
    """What a client prints as JSON in its last line."""
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.openai_port}/v1"


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, Any]:
    """The answers over gRPC, by their names in the clients."""
    stopping = pb.Stopping(max_new_tokens=9)
    roles = (("system", "Be brief."), ("user", QUESTION))
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in roles]))

    def text(asked: str, **fields: Any) -> str:
        return server.generation.Generate(request(asked, MODEL, **{"stopping": stopping, **fields})).text

    seeds = (pb.Sampling(temperature=1, seed=5 + choice) for choice in range(2))
    answers = {
        "chat": text("", prompt=chat),
        "chat, n": "|".join(text("", prompt=chat, sampling=sampling) for sampling in seeds),
        "completion": text(QUESTION),
        "completion, biased": text(QUESTION, sampling=pb.Sampling(logit_bias={65: 100})),
        "completions": f"{text(QUESTION)}|{text('x')}",
        "models": True,
    }
    return answers | {f"{name}, streamed": answers[name] for name in ("chat", "completion")}


def test_frameworks_get_the_answers_of_grpc(server: Server, expected: dict[str, Any]) -> None:
    answers = printed(PYTHON, CLIENTS / "frameworks.py", url(server), MODEL, QUESTION)
    assert answers.keys() == {"langchain", "litellm", "llamaindex"}
    for name, got in answers.items():
        assert got == {kind: expected[kind] for kind in got}, name
        assert len(got) >= 4
    server.wait_idle()


def test_openais_client_in_javascript_gets_the_answers_of_grpc(server: Server, expected: dict[str, Any]) -> None:
    assert printed(NODE, CLIENTS / "openai.js", url(server), MODEL, QUESTION) == expected
    server.wait_idle()


def tasks(folder: Path, base: Path) -> None:
    """Writes two tasks of the harness: choices, some of them the likeliest continuation, and completions."""
    model, tokenizer = load_base(base), AutoTokenizer.from_pretrained(base)
    documents = []
    for number in range(40):
        question = f"Question {number}:"
        likeliest = int(reference_logits(model, tokenizer.encode(question))[-1].argmax())
        continued = tokenizer.decode([likeliest])
        if continued.isascii() and continued.strip():
            documents.append(
                dict(question=question, choices=[" no", continued, " yes, of course"], label=1, answer="x")
            )
    assert len(documents) > 2
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents[:4])))
    common: dict[str, Any] = dict(
        dataset_path="json", dataset_kwargs={"data_files": {"test": str(data)}}, test_split="test"
    )
    common |= dict(doc_to_text="{{question}}", target_delimiter="")
    means = dict(aggregation="mean", higher_is_better=True)
    choices: dict[str, Any] = dict(
        output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{label}}"
    )
    choices |= dict(metric_list=[dict(metric=metric, **means) for metric in ("acc", "acc_norm")])
    completions: dict[str, Any] = dict(
        output_type="generate_until", doc_to_target="{{answer}}", metric_list=[dict(metric="exact_match", **means)]
    )
    completions |= dict(generation_kwargs=dict(until=["\n"], max_gen_toks=12, do_sample=False))
    for name, task in (("choices", choices), ("completions", completions)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(dict(task=name, **common, **task)))


def test_the_figures_of_lm_eval_are_those_with_transformers(server: Server, world: World, tmp_path: Path) -> None:
    tasks(tmp_path, world.base)
    api = dict(model="org/base", base_url=f"{url(server)}/completions", tokenizer=str(world.base), max_length=512)
    models: dict[str, Any] = {
        "local-completions": dict(api, num_concurrent=2, max_retries=1),
        "hf": dict(pretrained=str(world.base), dtype="float32", device="cpu", batch_size=1),
    }
    env = dict(OFFLINE, HF_HOME=str(tmp_path / "hf"))
    ours, theirs = printed(PYTHON, CLIENTS / "lm_eval_scores.py", tmp_path, json.dumps(models), **env)
    assert ours["results"] == theirs["results"]
    assert ours["results"]["choices"]["acc,none"] > 0
    assert ours["answers"]["completions"] == theirs["answers"]["completions"]
    flat = [torch.tensor(each["answers"]["choices"]).flatten() for each in (ours, theirs)]
    assert flat[0].tolist() == pytest.approx(flat[1].tolist(), abs=1e-3)
    assert 0 < sum(flat[1].view(-1, 2)[:, 1]) < len(flat[1].view(-1, 2))  # some are the likeliest, and some are not
    server.wait_idle()


def test_guidellm_counts_what_the_server_counts(server: Server, world: World, tmp_path: Path) -> None:
    report, count, prompt, answer = tmp_path / "report.json", 6, 32, 16
    before = server.metrics()
    command = [PYTHON.with_name("guidellm"), "run", "--disable-console", f"--output=kind=json,path={report}"]
    command += [f"--backend=kind=openai_http,target=http://127.0.0.1:{server.openai_port},model={MODEL}"]
    command += ["--profile=kind=concurrent,streams=2", f"--constraint=kind=max_requests,count={count}"]
    command += [f"--tokenizer=kind=hf_auto,model={world.base}"]
    command += [f"--data=kind=synthetic_text,prompt_tokens={prompt},output_tokens={answer}"]
    env = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hf"), "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), requests["errored"], requests["incomplete"]) == (count, [], [])
    assert [one["output_tokens"] for one in requests["successful"]] == [answer] * count
    assert all(one["prompt_tokens"] >= prompt and one["time_to_first_token_ms"] > 0 for one in requests["successful"])
    after = server.metrics()
    for ours, theirs in (("prompt", "prompt_tokens"), ("completion", "output_tokens")):
        counted = after[f"lorarep_{ours}_tokens_total"] - before[f"lorarep_{ours}_tokens_total"]
        assert counted == sum(one[theirs] for one in requests["successful"])
    server.wait_idle()
