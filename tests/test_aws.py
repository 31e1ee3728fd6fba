"""examples/aws: checked by the linters of each kind, and against the code that the files name.

Faults it must catch: an image built from files that do not suffice, an alarm on a metric, unit or dimension that nobody
writes, a container that serves on after a check of its set-up has failed, a service whose command does not exist.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import typer
import yaml
from botocore.stub import Stubber

from flash_mla.cli.app import app
from flash_mla.serving import sagemaker
from flash_mla.serving.emf import NAMESPACE, UNITS
from flash_mla.serving.text_request import Limits

ROOT = Path(__file__).resolve().parents[1]
AWS = ROOT / "examples" / "aws"
SCRIPTS = Path(sysconfig.get_path("scripts"))


def lint(*command: object) -> None:
    name, *arguments = map(str, command)
    # Beside this Python, or on the path where the packages were installed elsewhere.
    program = SCRIPTS / name if (SCRIPTS / name).exists() else name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_passes_hadolint() -> None:
    lint("hadolint", AWS / "Dockerfile")


@pytest.mark.parametrize("name", ["serve", "user-data.sh"])
def test_script_passes_shellcheck_and_stops_at_errors(name: str) -> None:
    file = AWS / name
    lint("shellcheck", "--enable=all", "--exclude=SC2250", file)  # 2250 wants braces around every name
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -euo pipefail"
    assert os.access(file, os.X_OK)


def test_the_service_starts_a_command_with_options_that_exist() -> None:
    script = (AWS / "user-data.sh").read_text()
    (line,) = re.findall(r"^ExecStart=(.+)$", script, re.MULTILINE)
    program, *words = shlex.split(line)
    assert program == "$HOME_DIR/venv/bin/flash-mla"
    command, *options = words
    context = (
        typer.main.get_command(app).commands[command].make_context(command, options)
    )  # raises on what is not there
    assert context.params["model"] == "$MODEL"
    assert (context.params["host"], context.params["port"]) == ("127.0.0.1", 8000)
    key = next(one for one in context.command.params if one.name == "api_key").envvar
    assert f"'{key}=%s\\n'" in script
    assert "EnvironmentFile=/etc/flash-mla.env" in script
    for called in re.findall(r'^"\$HOME_DIR/venv/bin/flash-mla" (.+)$', script, re.MULTILINE):
        name, *options = shlex.split(called.replace("$REQUIRE", "triton"))
        typer.main.get_command(app).commands[name].make_context(name, options)


def test_templates_pass_cfn_lint() -> None:
    lint("cfn-lint", AWS / "alarm.yaml", AWS / "endpoint.yaml")


# --- the image --------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (AWS / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_what_the_image_copies_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "cubins")
    for instruction, rest in instructions():
        if instruction != "COPY":
            continue
        *sources, target = shlex.split(rest)
        for source in sources:
            assert (ROOT / source).exists(), source
            if target.startswith("/"):
                continue
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, context / target)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=context,
        check=True,
        capture_output=True,
        env={**os.environ, "FLASH_MLA_KERNEL": "0"},
    )
    (wheel,) = (context / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert "flash_mla/serving/sagemaker_service.py" in file.namelist()
        (metadata,) = (name for name in file.namelist() if name.endswith("METADATA"))
        assert "Provides-Extra: sagemaker" in file.read(metadata).decode()


def test_the_images_settings_are_read_by_the_code() -> None:
    (environment,) = (rest for instruction, rest in instructions() if instruction == "ENV")
    given = dict(word.split("=", 1) for word in shlex.split(environment))
    assert given["SAGEMAKER_PROGRAM"] == sagemaker.__name__
    source = (ROOT / "src" / "flash_mla" / "serving" / "sagemaker.py").read_text()
    ours = {name for name in given if name.startswith("FLASH_MLA_")}
    assert ours == {"FLASH_MLA_EMF_PATH"}
    assert '"FLASH_MLA_EMF_PATH"' in source


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: nothing here that cannot run")
def test_a_backend_that_cannot_run_ends_the_container(tmp_path: Path) -> None:
    # The two commands that `serve` calls: this Python's own, and one that says that the server was started.
    for name, line in (
        ("flash-mla", f"exec {sys.executable} -c 'from flash_mla.cli import main; main()' \"$@\""),
        ("python", "echo started"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [AWS / "serve"], env={**variables, "FLASH_MLA_REQUIRE": "triton"}, capture_output=True, text=True
    )
    assert done.returncode == 6, done.stderr
    assert "WRONG (6): backend triton does not run here: cpu: needs a GPU" in done.stderr
    assert done.stdout == ""  # the server was not started, and the report is no metric line


def test_the_endpoints_settings_are_read_by_the_code() -> None:
    template = yaml.safe_load((AWS / "endpoint.yaml").read_text())
    given = template["Resources"]["Model"]["Properties"]["PrimaryContainer"]["Environment"]
    code = (AWS / "serve").read_text() + Path(sagemaker.__file__).read_text()
    assert sorted(given) == ["FLASH_MLA_EMF_SERVICE", "FLASH_MLA_REQUIRE"]
    assert all(name in code for name in given)
    alarm = yaml.safe_load((AWS / "alarm.yaml").read_text())
    assert template["Parameters"]["Service"]["Default"] == alarm["Parameters"]["Service"]["Default"]


def test_the_page_names_every_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "aws.md").read_text()
    for field in dataclasses.fields(Limits):
        assert f"| `FLASH_MLA_{field.name.upper()}` | {field.default} |" in page
    assert set(re.findall(r"`(\w+)`", page.split("## Metrics")[1].split("\n\n")[2])) == set(UNITS)


# --- the alarm --------------------------------------------------------------------------------------------------------


def resolved(value: Any, parameters: dict[str, Any]) -> Any:
    """A template's value with its parameters put in; a missing one is left out."""
    if isinstance(value, dict) and set(value) == {"Ref"}:
        return parameters.get(value["Ref"])
    if isinstance(value, dict) and set(value) == {"Fn::If"}:
        _, then, _ = value["Fn::If"]
        return resolved(then, parameters)
    if isinstance(value, dict):
        return {key: resolved(item, parameters) for key, item in value.items()}
    return [resolved(item, parameters) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def alarm() -> dict[str, Any]:
    template = yaml.safe_load((AWS / "alarm.yaml").read_text())
    parameters = {name: parameter["Default"] for name, parameter in template["Parameters"].items()}
    parameters["Topic"] = "arn:aws:sns:eu-west-1:123456789012:oncall"
    return resolved(template["Resources"]["PagesAlarm"]["Properties"], parameters)


def test_cloudwatch_takes_the_alarm(alarm: dict[str, Any]) -> None:
    client = boto3.client("cloudwatch", region_name="eu-west-1", aws_access_key_id="x", aws_secret_access_key="x")
    with Stubber(client) as stub:
        stub.add_response("put_metric_alarm", {}, {"AlarmName": "pages", **alarm})
        client.put_metric_alarm(AlarmName="pages", **alarm)  # parameters are checked against the service's model
        stub.assert_no_pending_responses()


def test_the_alarm_looks_at_what_is_written(alarm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NAMESPACE", "SERVICE", "PATH"):
        monkeypatch.delenv(f"FLASH_MLA_EMF_{name}", raising=False)
    sagemaker._settings.cache_clear()
    limits, writer = sagemaker._settings()
    sagemaker._settings.cache_clear()
    assert limits == Limits()
    series = {metric["Id"]: metric["MetricStat"] for metric in alarm["Metrics"] if "MetricStat" in metric}
    for stat in series.values():
        assert stat["Metric"]["Namespace"] == writer.namespace == NAMESPACE
        assert {one["Name"]: one["Value"] for one in stat["Metric"]["Dimensions"]} == writer.dimensions
        assert stat["Unit"] == UNITS[stat["Metric"]["MetricName"]]
    assert {name: stat["Metric"]["MetricName"] for name, stat in series.items()} == {
        "used": "KVPagesUsed",
        "total": "KVPagesTotal",
    }
    (expression,) = (metric["Expression"] for metric in alarm["Metrics"] if "Expression" in metric)
    assert eval(expression, {}, {"used": 410, "total": 512}) > alarm["Threshold"]
    assert eval(expression, {}, {"used": 409, "total": 512}) < alarm["Threshold"]
