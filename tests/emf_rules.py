"""What CloudWatch's embedded metric format asks of a document, rule by rule."""

from __future__ import annotations

import time
from typing import Any

import botocore.session


def units_of_cloudwatch() -> list[str]:
    """What CloudWatch takes as a unit, from the service's own description of its API."""
    return botocore.session.get_session().get_service_model("cloudwatch").shape_for("StandardUnit").enum


def assert_is_emf(document: dict[str, Any]) -> None:
    """The rules of the format's specification, one by one."""
    head = document["_aws"]
    assert sorted(head) == ["CloudWatchMetrics", "Timestamp"]
    assert type(head["Timestamp"]) is int
    now = time.time() * 1000
    assert now - 14 * 86_400_000 < head["Timestamp"] < now + 2 * 3_600_000  # what CloudWatch Logs accepts
    (directive,) = head["CloudWatchMetrics"]
    assert sorted(directive) == ["Dimensions", "Metrics", "Namespace"]
    assert 1 <= len(directive["Namespace"]) <= 255
    for names in directive["Dimensions"]:
        assert len(names) <= 30
        for name in names:
            assert isinstance(document[name], str)
            assert 1 <= len(document[name]) <= 1024
    assert 1 <= len(directive["Metrics"]) <= 100
    declared = [metric["Name"] for metric in directive["Metrics"]]
    assert len(set(declared)) == len(declared)
    for metric in directive["Metrics"]:
        assert sorted(metric) == ["Name", "Unit"]
        assert metric["Unit"] in units_of_cloudwatch()
        assert type(document[metric["Name"]]) in (int, float)
