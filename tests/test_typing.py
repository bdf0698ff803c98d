"""A type checker sees the public names with their types, and a misspelt one as an error."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_normswap


ROOT = Path(__file__).parents[1]
USES = ROOT / "tests" / "typing" / "public_names.py"


def test_the_file_for_the_type_checker_uses_every_public_name():
    tree = ast.parse(USES.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(hf_normswap.__all__) <= used


@pytest.mark.slow
def test_a_type_checker_sees_the_public_names():
    pytest.importorskip("basedpyright")
    # The files to check and the rules are in pyproject.toml.
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)
    found = [
        f"{Path(problem['file']).name}:{problem['range']['start']['line'] + 1}: {problem['message']}"
        for problem in report["generalDiagnostics"]
    ]
    assert report["summary"]["filesAnalyzed"] == 1
    assert not found, "\n".join(found)
