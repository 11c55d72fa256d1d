"""The dashboard, the alerts and the autoscaler use metrics that a live server exports."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from grpc import StatusCode
from prometheus_client.parser import text_string_to_metric_families

from lorarep_runtime.request import FinishReason
from tests.support.callers import request
from tests.support.servers import Server

DEPLOY = Path(__file__).parents[2] / "deploy"
TARGET = {"job", "instance"}
"""Labels that Prometheus adds to every sample."""
CODES = {code.name.lower() for code in StatusCode}
VALUES = {"reason": CODES | {reason.value for reason in FinishReason}, "outcome": CODES}
"""Labels that may have values which a live server does not have."""

Series = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def series(server: Server) -> Series:
    """The values of each label of each metric, from a server that has loaded adapters and answered requests."""
    server.generation.Generate(request("abc", "lora", new_tokens=4))
    found: Series = {}
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


def panels() -> Iterator[dict[str, Any]]:
    board = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    return (panel for panel in board["panels"] if panel["type"] != "row")


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())["groups"]:
        yield from group["rules"]


def check(expression: str, shown: str, series: Series) -> None:
    """Asserts that a query is PromQL, and that it and its legend name existing metrics and labels."""
    vectors, labels = [], set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", shown))

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            vectors.append(node)
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)
        if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            labels.update(node.modifier.matching.labels)

    promql.walk(promql.parse(expression.replace("$__rate_interval", "5m")), visit)
    assert vectors
    known = set(TARGET)
    for vector in vectors:
        assert vector.name in series, f"{vector.name} is no metric of the server"
        known |= series[vector.name].keys()
        for matcher in vector.matchers.matchers:
            if matcher.name not in TARGET:
                values = VALUES.get(matcher.name, set()) | series[vector.name].get(matcher.name, set())
                assert set(matcher.value.split("|")) <= values, f"{vector.name}: {matcher.name}"
    assert labels <= known, f"{expression}: {shown}"


def test_the_dashboard_asks_for_what_there_is(series: Series) -> None:
    for panel in panels():
        assert panel["targets"]
        for target in panel["targets"]:
            check(target["expr"], target["legendFormat"], series)


def test_the_dashboard_has_room_for_every_panel() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_variables_of_the_dashboard_are_labels_of_what_there_is(series: Series) -> None:
    board = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables.keys() == TARGET | {"datasource"}
    for name in TARGET:
        metric = re.match(r"label_values\((\w+)", variables[name]["query"]["query"])
        assert metric is not None
        assert metric[1] in series


def test_alerts_ask_for_what_there_is(series: Series) -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
        check(rule["expr"], " ".join(rule["annotations"].values()), series)


def test_the_autoscaler_asks_for_what_there_is(series: Series) -> None:
    scaler = yaml.safe_load((DEPLOY / "overlays" / "gpu" / "autoscaler.yaml").read_text())
    for metric in scaler["spec"]["metrics"]:
        assert metric["pods"]["metric"]["name"] in series


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("lorarep_requests_wating", ""),
        ("lorarep_queue_seconds_total", ""),
        ('lorarep_adapters_loaded{tier="ram"}', ""),
        ('rate(lorarep_requests_finished_total{reason="oom"}[5m])', ""),
        ("sum by (pod) (lorarep_requests_waiting)", ""),
        ("lorarep_requests_waiting", "{{tier}}"),
    ],
)
def test_a_query_for_what_there_is_not_is_found(series: Series, expression: str, shown: str) -> None:
    with pytest.raises(AssertionError):
        check(expression, shown, series)
