"""What an installation holds, and who may import whom."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_of_the_tree_is_installed() -> None:
    listed = set(setup_cfg()["options"]["packages"].split())
    folders = {file.parent for top in ("exporter", "plugins") for file in (ROOT / top).rglob("*.py")}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"fp4export_recipes"}


def test_every_file_of_the_recipes_is_installed() -> None:
    patterns = setup_cfg()["options.package_data"]["fp4export_recipes"].split()
    recipes = ROOT / "recipes"
    installed = {file for pattern in patterns for file in recipes.glob(pattern)}
    files = {file for file in recipes.rglob("*") if file.is_file() and not file.name.startswith(".")}
    assert files - installed == set()


def test_no_module_of_plugins_imports_exporter_or_torch() -> None:
    for file in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            heads = {name.split(".")[0] for name in names}
            # What importing them loads is tests/plugins/test_plugin_imports.py's; these are not even for functions.
            assert not heads & {"exporter", "torch", "tensorrt_rtx", "diffusers"}, file


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import exporter", {"torch", "onnx", "tensorrt", "tensorrt_rtx", "triton", "diffusers"}),
        ("import exporter.cli", {"torch", "onnx", "tensorrt", "tensorrt_rtx", "triton", "diffusers"}),
        # torch itself loads Triton where it is installed.
        ("import exporter.pipeline", {"tensorrt", "tensorrt_rtx"}),
    ],
)
def test_imports_stay_light(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(*sorted(set(sys.modules) & {absent!r}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_python_files_keep_to_the_line_budget() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split():
        assert len((ROOT / name).read_text().splitlines()) <= 300, name
