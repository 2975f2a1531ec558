"""The README's commands, snippets, table and links are true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli import command, main
from exporter.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The same job on less data, so that a test takes seconds.
LESS = [
    "method.name=rtn",
    "calibration.samples=2",
    "calibration.steps=4",
    "evaluation.trajectories=1",
    "evaluation.samples=20",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader runs the commands: the outputs have one work folder, whose finished stages are reused."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "build").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("fp4export"), ids=lambda words: words[-1])
def test_command_lines_write_what_they_name(words: list[str], project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    overrides = [word for change in LESS for word in ("--set", change)]
    assert main([*words[1:], *overrides, "--quiet"]) == 0
    assert (project / words[-1]).stat().st_size > 1_000_000


@pytest.mark.slow
def test_python_snippet_runs(project: Path) -> None:
    (snippet,) = blocks("python")
    assert 'load_recipe("digits")' in snippet
    less = snippet.replace('load_recipe("digits")', f'load_recipe("digits", {LESS!r})')
    run = subprocess.run(
        [sys.executable, "-c", less], cwd=project / "build", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("True ")


def test_recipe_snippet_loads(tmp_path: Path) -> None:
    (snippet,) = blocks("yaml")
    (tmp_path / "my.yaml").write_text(snippet)
    assert load_recipe(tmp_path / "my.yaml").preset == "w4a6"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for words in commands("make")}
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_format_table_is_the_generated_one() -> None:
    run = subprocess.run([sys.executable, "-m", "tools.format_table", "--check"], cwd=ROOT, check=False)
    assert run.returncode == 0, "run: python -m tools.format_table"


FEATURES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.partition("<!-- features")[2].partition("<!-- end of features -->")[0].splitlines()
    if line.startswith("| ")
][1:]


@pytest.mark.parametrize(("how", "tests"), [row[1:] for row in FEATURES], ids=[row[0] for row in FEATURES])
def test_every_feature_names_tests_that_use_it(how: str, tests: str) -> None:
    """The last word of a command, a key or a value (`fp4export embed`, `method.name: gptq`) is in one of the tests."""
    places = re.findall(r"`(tests/[\w/.]+)`", tests)
    assert places
    texts = []
    for place in places:
        files = [ROOT / place] if place.endswith(".py") else [*(ROOT / place).rglob("test_*.py")]
        found = [file.read_text(encoding="utf-8") for file in files]
        assert any("def test_" in text for text in found), place
        texts += found
    for code in re.findall(r"`([^`]+)`", how):
        word = re.findall(r"\w+", code)[-1]
        assert any(re.search(rf"\b{word}\b", text) for text in texts), f"no test in {tests} has {word!r} of {code!r}"


def test_the_features_commands_exist() -> None:
    named = {name for _, how, _ in FEATURES for name in re.findall(r"`fp4export ([a-z]+)", how)}
    assert len(FEATURES) >= 10
    assert named
    assert named <= {*command.commands}


@pytest.mark.parametrize("file", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert ((ROOT / file).parent / link).exists(), link


def test_keys_of_the_recipe_guide_are_the_recipe_s() -> None:
    from exporter.recipe import Recipe

    guide = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:model|calibration|method|evaluation)\.\w+|\.\w+)`", guide))
    fields = {
        name
        for section in Recipe.model_fields.values()
        if hasattr(section.annotation, "model_fields")
        for name in section.annotation.model_fields
    }
    assert {name.rpartition(".")[2] for name in named} == fields
