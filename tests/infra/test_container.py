"""The container's files, as far as they can be checked without Docker: what they copy, pin and start."""

import re
import shlex
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "infra" / "cluster" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "cluster" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_every_room_is_copied_and_nothing_that_is_not_there():
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for name in shlex.split(line)[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    assert {path.name for path in (ROOT / "hbi").iterdir() if path.is_symlink()} <= copied and "hbi" in copied


def test_it_runs_as_nobody_in_particular_with_what_the_tests_ran_with():
    assert re.search(r"^USER 1000$", DOCKERFILE, re.MULTILINE) and "VOLUME /cache" in DOCKERFILE
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert pins["boto3"] and pins["ray"] == metadata.version("ray")
    installs = re.findall(r"pip install [^;&\\\n]*", DOCKERFILE)
    assert installs and all("-c constraints.txt" in install for install in installs)


@pytest.mark.parametrize("service", ["head", "worker"])
def test_ray_takes_what_its_services_are_started_with(service: str):
    from ray.scripts.scripts import start

    command = SERVICES[service]["command"]
    assert command[:2] == ["ray", "start"]
    context = start.make_context("start", command[2:])
    assert context.params["block"] and context.params["head"] == (service == "head")


def test_mlflow_takes_what_its_service_is_started_with():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints when it is imported
        from mlflow.cli import server

    context = server.make_context("server", SERVICES["mlflow"]["command"][2:])
    assert context.params["serve_artifacts"] and context.params["artifacts_destination"] == "s3://mlflow"
    assert "mlflow:5000" in context.params["allowed_hosts"]  # as clients of the network say it


def test_the_client_submits_and_everyone_knows_where_things_are():
    from hbi import cli

    entrypoint = SERVICES["client"]["entrypoint"]
    assert entrypoint[:2] == ["hbi", "submit"]
    command = [*entrypoint[2:], "shard", "s3://corpus/m.jsonl", "s3://corpus/shards"]
    assert cli.read("submit", command).address == "http://head:8265"
    assert SERVICES["head"]["ports"][0] == "127.0.0.1:8265:8265"
    variables = [SERVICES[name]["environment"] for name in ("head", "worker", "client", "mlflow")]
    assert all(each == variables[0] for each in variables)
    assert all(port.startswith("127.0.0.1:") for each in SERVICES.values() for port in each.get("ports", []))
