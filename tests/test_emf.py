"""CloudWatch metric lines: the structure that the service reads, and what it would drop without a word.

Faults it must catch: a metric that is declared and has no member (or the reverse), a unit that CloudWatch does not
know, seconds where milliseconds belong, a dimension without a member, a line with anything but the document on it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from emf_rules import assert_is_emf

from flash_mla.serving.emf import EmfWriter, RequestNumbers, emf_document

ALL = RequestNumbers(
    prompt_tokens=70,
    generated_tokens=12,
    time_per_token_ms=8.25,
    time_to_first_token_ms=41.5,
    kv_pages_used=2,
    kv_pages_total=256,
)
NAMES = {
    "Requests",
    "Errors",
    "PromptTokens",
    "GeneratedTokens",
    "TimePerToken",
    "TimeToFirstToken",
    "KVPagesUsed",
    "KVPagesTotal",
}


def test_document_has_the_structure_that_cloudwatch_reads() -> None:
    document = emf_document(ALL.metrics(), dimensions={"Service": "sagemaker", "Model": "tiny"})
    assert_is_emf(document)
    (directive,) = document["_aws"]["CloudWatchMetrics"]
    assert directive["Namespace"] == "FlashMLA"
    assert directive["Dimensions"] == [["Service", "Model"]]
    units = {metric["Name"]: metric["Unit"] for metric in directive["Metrics"]}
    assert set(units) == NAMES
    assert {name for name, unit in units.items() if unit == "Milliseconds"} == {"TimePerToken", "TimeToFirstToken"}
    assert {name: document[name] for name in NAMES} == {
        "Requests": 1,
        "Errors": 0,
        "PromptTokens": 70,
        "GeneratedTokens": 12,
        "TimePerToken": 8.25,
        "TimeToFirstToken": 41.5,
        "KVPagesUsed": 2,
        "KVPagesTotal": 256,
    }


def test_what_is_not_known_is_not_a_metric() -> None:
    document = emf_document(RequestNumbers(is_error=True).metrics(), dimensions={}, properties={"Status": 400})
    assert_is_emf(document)
    (directive,) = document["_aws"]["CloudWatchMetrics"]
    assert directive["Dimensions"] == [[]]
    assert [metric["Name"] for metric in directive["Metrics"]] == ["Requests", "Errors"]
    assert (document["Errors"], document["Status"]) == (1, 400)
    assert "PromptTokens" not in document


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"namespace": ""}, "namespace must be"),
        ({"namespace": "AWS/SageMaker"}, "not begin with AWS/"),
        ({"namespace": "Flash MLA"}, "namespace must be"),
        ({"metrics": {}}, "at least one metric"),
        ({"metrics": {"Latency": 1}}, "got 'Latency'"),
        ({"metrics": {"TimePerToken": float("nan")}}, "TimePerToken must be a finite number >= 0, got nan"),
        ({"metrics": {"Errors": True}}, "Errors must be a finite number"),
        ({"metrics": {"KVPagesUsed": -1}}, "KVPagesUsed must be a finite number >= 0, got -1"),
        ({"dimensions": {f"D{n}": "x" for n in range(31)}}, "at most 30 dimensions, got 31"),
        ({"dimensions": {"Model": " "}}, "the value of a dimension must be 1 to 1024 ASCII characters"),
        ({"dimensions": {"Model": "modèle"}}, "ASCII"),
        ({"dimensions": {":Model": "x"}}, "must not begin with a colon"),
        ({"dimensions": {"Requests": "x"}}, r"names of their own: \['Requests'\]"),
        ({"properties": {"_aws": {}}}, r"names of their own: \['_aws'\]"),
    ],
)
def test_what_cloudwatch_would_not_take_is_refused(change: dict[str, Any], reason: str) -> None:
    call = {"metrics": {"Requests": 1}, "dimensions": {"Model": "tiny"}, **change}
    with pytest.raises(ValueError, match=reason):
        emf_document(call.pop("metrics"), **call)


def test_one_line_per_request_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    writer = EmfWriter({"Service": "test"}, namespace="Mine")
    returned = [writer.write(ALL, Status=200), writer.write(RequestNumbers(is_error=True), Status=413)]
    out, err = capsys.readouterr()
    lines = out.splitlines(keepends=True)
    assert len(lines) == 2
    for line, document in zip(lines, returned, strict=True):
        assert line.endswith("\n")
        assert json.loads(line) == document
        assert_is_emf(document)
        assert document["_aws"]["CloudWatchMetrics"][0]["Namespace"] == "Mine"
    assert err == ""


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.touch()
    writers = [EmfWriter({"Worker": str(number)}, path=str(file)) for number in range(3)]
    for _ in range(5):
        for writer in writers:
            writer.write(ALL)
    lines = file.read_text().splitlines()
    assert [json.loads(line)["Worker"] for line in lines] == ["0", "1", "2"] * 5
    assert max(map(len, lines)) < 4096
    for writer in writers:
        os.close(writer.descriptor)


def test_mistakes_are_found_before_the_first_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="namespace"):
        EmfWriter({}, namespace="AWS/Mine")
    with pytest.raises(FileNotFoundError):
        EmfWriter({}, path=str(tmp_path / "mistyped"))
    assert list(tmp_path.iterdir()) == []
