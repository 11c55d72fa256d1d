"""A small base and its adapters in a stand-in for the Hub, for tests and benchmarks of whole servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.failpoints import Failpoints
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter, save_base, save_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HERMES = """{% if tools %}<tools>{% for tool in tools %}{% set function = tool.function %}
{{ function.name }}: {{ function.parameters.properties | default({}) | tojson }}
{% endfor %}</tools>In <tool_call></tool_call>.{% endif %}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}
{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{% endfor %}{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""
"""A template that tells tools, whose model calls them in the format of Hermes."""
ADAPTERS = {
    "lora": dict(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 4], [2, 5]]),
    "dora": dict(r=3, target_modules=["o_proj", "up_proj"], layer_replication=[[1, 5]], use_dora=True),
    "plain": dict(r=2, target_modules=["down_proj"]),
}
"""The adapters' configurations, by name."""


@dataclass(frozen=True)
class World:
    """The published base and adapters, as `org/<name>`, and the cache and failpoints of servers that serve them."""

    hub: FaultyHub
    base: Path
    adapters: dict[str, Path]
    cache: Path
    failpoints: Failpoints
    """The failpoints of servers that are started with this world's `env`."""

    def flags(self) -> list[str]:
        """The flags of a server of the base."""
        return ["--base=org/base", "--dtype=float32", "--kv-bytes=2MiB", f"--cache-dir={self.cache}"]

    @property
    def env(self) -> dict[str, str]:
        """The environment variables of a server."""
        return {"HF_ENDPOINT": self.hub.url, "LORAREP_FAILPOINTS": str(self.failpoints.folder)}

    @contextmanager
    def slow_steps(self) -> Iterator[None]:
        """Slows each step of the servers to 10 ms or more while the context lasts.

        A GPU would otherwise finish a stream of 500 tokens before a test can do anything to it.
        """
        self.failpoints.set("step", "sleep 0.01")
        try:
            yield
        finally:
            self.failpoints.unset("step")


@contextmanager
def published(folder: Path) -> Iterator[World]:
    """Makes the base and its adapters in a folder, and publishes them while the context lasts."""
    base = save_base("llama", folder / "base")
    adapters = {
        name: save_adapter(base, folder / name, seed=i, **config) for i, (name, config) in enumerate(ADAPTERS.items())
    }
    save_tokenizer(adapters["dora"])
    file = adapters["dora"] / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    with FaultyHub() as hub:
        hub.publish("org/base", base)
        for name, path in adapters.items():
            hub.publish(f"org/{name}", path)
        yield World(hub, base, adapters, folder / "cache", Failpoints(folder / "server-failpoints"))
