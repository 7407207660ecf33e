"""What a contributor's tools read."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = [*sorted((ROOT / ".github").rglob("*.yaml")), ROOT / ".pre-commit-config.yaml"]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_is_yaml_of_names_and_values(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_workflow_runs_what_is_there() -> None:
    jobs = read(".github/workflows/ci.yaml")["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert runs["checks"] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    install, test = runs["lowest-versions"][-2:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "--resolution lowest-direct" in install
    assert "'.[test]'" in install
    assert "test" in project["optional-dependencies"]
    assert test.startswith("python -m pytest ")
    lowest = jobs["lowest-versions"]["steps"][1]["with"]["python-version"]
    assert project["requires-python"] == f">={lowest}"


def test_the_lowest_versions_are_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [need for need in project["dependencies"] if not re.search(r">=\d", need)] == []


def test_hooks_check_as_the_checks_do() -> None:
    hooks = {hook["id"]: hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert hooks["ruff-check"]["entry"].startswith("ruff check")
    assert hooks["ruff-format"]["entry"].startswith("ruff format")
    assert {"check-added-large-files", "check-yaml", "end-of-file-fixer"} <= hooks.keys()
    limit = int(re.sub(r"\D", "", hooks["check-added-large-files"]["args"][0]))
    named = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    files = [ROOT / name for name in named if name] or list((ROOT / "docs").iterdir())
    assert [path for path in files if path.is_file() and path.stat().st_size > limit * 1024] == []


def test_issue_forms_ask_something() -> None:
    forms = [read(f".github/ISSUE_TEMPLATE/{name}.yaml") for name in ("bug", "method")]
    for form in forms:
        assert form["name"]
        assert form["description"]
        assert any(entry.get("validations", {}).get("required") for entry in form["body"])
        assert {entry["type"] for entry in form["body"]} <= {"textarea", "input", "checkboxes", "markdown", "dropdown"}


def test_no_file_and_no_class_is_long() -> None:
    files = sorted((ROOT / "salun_lightning").rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert {path.name: text.count("\n") for path, text in texts.items() if text.count("\n") > 300} == {}
    classes = [node for text in texts.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > 200} == {}
