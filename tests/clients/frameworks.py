"""Asks a server by the frameworks that applications use, and prints the texts of their answers as JSON, by their names.

Arguments: the URL of the API, a model with a chat template, and a question.
"""

# ruff: noqa: T201

import json
import os
import sys
from collections.abc import Iterator

url, model, question = sys.argv[1:]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
os.environ["LANGSMITH_TRACING"] = "false"
MOST, SEED = 9, 5
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]


def langchain() -> Iterator[tuple[str, str]]:
    from langchain_core.messages import convert_to_messages
    from langchain_openai import ChatOpenAI, OpenAI

    asked = dict(base_url=url, api_key="none", model=model, temperature=0, max_tokens=MOST, max_retries=0)
    chat = ChatOpenAI(**asked)
    yield "chat", str(chat.invoke(CHAT).content)
    yield "chat, streamed", "".join(str(part.content) for part in chat.stream(CHAT))
    several = ChatOpenAI(**(asked | dict(temperature=1)), n=2, seed=SEED, metadata={"run": "x"})
    yield "chat, n", "|".join(each.text for each in several.generate([convert_to_messages(CHAT)]).generations[0])
    completions = OpenAI(**asked)
    yield "completion", completions.invoke(question)
    yield "completion, streamed", "".join(completions.stream(question))
    biased = OpenAI(**asked, logit_bias={"65": 100})
    yield "completion, biased", biased.invoke(question)
    yield "completions", "|".join(each[0].text for each in completions.generate([question, "x"]).generations)


def litellm() -> Iterator[tuple[str, str]]:
    import litellm as client

    asked = dict(api_base=url, api_key="none", temperature=0, max_tokens=MOST)
    chat = dict(asked, model=f"hosted_vllm/{model}", messages=CHAT, user="me")
    likely = dict(top_k=5)
    yield "chat", client.completion(**chat, extra_body=likely).choices[0].message.content
    yield "chat, streamed", "".join(p.choices[0].delta.content or "" for p in client.completion(**chat, stream=True))
    several = client.completion(**(chat | dict(temperature=1)), n=2, seed=SEED)
    yield "chat, n", "|".join(choice.message.content for choice in several.choices)
    text = dict(asked, model=f"text-completion-openai/{model}")
    yield "completion", client.text_completion(**text, prompt=question).choices[0].text
    parts = client.text_completion(**text, prompt=question, stream=True)
    yield "completion, streamed", "".join(part.choices[0].text or "" for part in parts)
    several = client.text_completion(**text, prompt=[question, "x"])
    yield "completions", "|".join(choice.text for choice in several.choices)


def llamaindex() -> Iterator[tuple[str, str]]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    asked = dict(model=model, api_base=url, api_key="none", temperature=0, max_tokens=MOST, max_retries=0)
    chat, told = OpenAILike(**asked, is_chat_model=True), [ChatMessage(**message) for message in CHAT]
    yield "chat", chat.chat(told).message.content or ""
    yield "chat, streamed", "".join(part.delta or "" for part in chat.stream_chat(told))
    completions = OpenAILike(**asked, is_chat_model=False)
    yield "completion", completions.complete(question).text
    yield "completion, streamed", "".join(part.delta or "" for part in completions.stream_complete(question))


print(json.dumps({kind.__name__: dict(kind()) for kind in (langchain, litellm, llamaindex)}))
