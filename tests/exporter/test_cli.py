"""The command: exit codes, one-line errors, and what it hands to the pipeline."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exporter.cli import main
from exporter.errors import EnvironmentLacksError, FidelityError, InputError
from exporter.recipe_file import shipped_recipes
from exporter.shards import Shard
from exporter.targets import TARGETS

RECIPE = "model: {weights: model}\npreset: w4a6\ncalibration: {prompts: p.safetensors}\n"
CONFIG = {
    "_class_name": "PixArtTransformer2DModel",
    "attention_head_dim": 64,
    "caption_channels": 16,
    "cross_attention_dim": 128,
    "in_channels": 1,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 1,
    "sample_size": 8,
}


class Pipeline:
    """Stands in for the pipeline: remembers its arguments and ends as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.options: dict[str, Any] = {}
        self.end: Callable[[], None] = lambda: None

    def export(self, *arguments: Any, **options: Any) -> SimpleNamespace:
        self.calls.append(arguments)
        self.options = options
        self.end()
        return SimpleNamespace(output="OUT", report="REPORT", metrics="METRICS", work_dir="WORK", fidelity=None)

    def validate_output(self, *arguments: Any, **options: Any) -> None:
        self.calls.append(arguments)
        self.options = options
        self.end()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The stand-in, in the pipeline's place."""
    stand_in = Pipeline()
    module: Any = ModuleType("exporter.pipeline")
    module.export, module.validate_output = stand_in.export, stand_in.validate_output
    # For the other processes of torchrun, of which there are none here.
    module.assist_export = None
    monkeypatch.setitem(sys.modules, "exporter.pipeline", module)
    return stand_in


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe and a model's config."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raising(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def test_help_tells_the_whole_story_without_loading_torch() -> None:
    code = (
        "import sys; from exporter.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'diffusers', 'onnx', 'onnxruntime', 'tensorrt'} & set(sys.modules); "
        "sys.exit(code or len(heavy))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert answer.returncode == 0, answer.stderr
    text = " ".join(answer.stdout.split())
    for option in ("--output", "--target", "--seed", "--set", "--work-dir", "--dry-run", "--no-validate"):
        assert option in text
    for option in ("--keep-graphs", "--resume / --fresh", "the default", "--quiet", "--debug"):
        assert option in text
    for word in (*shipped_recipes(), *TARGETS, "130", "NAME.report.html", "fp4export validate FILE"):
        assert word in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["digits", "--help"], ["validate", "--help"], ["--version"]])
def test_asking_for_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "fp4export" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_the_flags_reach_the_pipeline(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--target rtx-sm86 --seed 7 --set calibration.steps=3 --set preset=w4a16 --work-dir W --no-validate"
    assert main(["r.yaml", "-o", "out.plan", *flags.split(), "--keep-graphs", "--fresh"]) == 0
    recipe, output = pipeline.calls[0]
    assert str(output) == "out.plan"
    assert (recipe.target, recipe.preset) == ("rtx-sm86", "w4a16")
    assert (recipe.calibration.seed, recipe.calibration.steps) == (7, 3)
    progress = pipeline.options.pop("progress")
    assert pipeline.options.pop("shard") == Shard(rank=0, world=1, local_rank=0)
    assert pipeline.options == {"work_dir": "W", "validate": False, "keep_graphs": True, "fresh": True}
    assert type(progress).__name__ == "RichProgress"
    assert capsys.readouterr().out.split() == [
        "engine",
        "OUT",
        "report",
        "REPORT",
        "metrics",
        "METRICS",
        "work",
        "WORK",
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("flags", "fresh"), [([], False), (["--resume"], False), (["--fresh"], True)])
def test_resuming_is_the_default_and_can_be_said(flags: list[str], fresh: bool, pipeline: Pipeline) -> None:
    assert main(["r.yaml", "-o", "out.onnx", *flags]) == 0
    assert pipeline.options["fresh"] is fresh
    assert main([*flags, "r.yaml", "-o", "out.onnx"]) == 0
    assert pipeline.options["fresh"] is fresh


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("start", [["--quiet", "r.yaml", "-o"], ["-o"], ["export", "--quiet", "r.yaml", "-o"]])
def test_options_may_come_first_and_quiet_is_quiet(
    start: list[str], pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [] if "r.yaml" in start else ["r.yaml", "--quiet"]
    assert main([*start, "out.onnx", *rest]) == 0
    assert type(pipeline.options["progress"]).__name__ == "NullProgress"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.usefixtures("folder")
def test_validate_takes_an_output(pipeline: Pipeline, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "absent.onnx"]) == 2
    assert capsys.readouterr().err == (
        "error: absent.onnx: no such file; validate takes an output that fp4export wrote\n"
    )
    (folder / "out.onnx").write_bytes(b"")
    assert main(["validate", "out.onnx"]) == 0
    assert str(pipeline.calls[0][0]) == "out.onnx"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("r.yaml: bad"), 2, "error: r.yaml: bad"),
        (EnvironmentLacksError("no tensorrt"), 3, "error: no tensorrt"),
        (FidelityError("layer x deviates"), 4, "error: layer x deviates"),
        (InputError("two\n  lines"), 2, "error: two lines"),
        (KeyboardInterrupt(), 130, "finished stages are kept"),
        (OSError(errno.ENOSPC, "No space left on device", "out.onnx"), 2, "out.onnx: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/r/o"), 2, "error: /r/o: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: Read-only file system"),
        (ModuleNotFoundError("No module named 'tensorrt'"), 3, "a package is missing: No module named 'tensorrt'"),
        (MemoryError(), 3, "too little memory"),
        (RuntimeError("surprise"), 1, "error: internal: RuntimeError: surprise; please report it"),
    ],
)
def test_every_end_has_its_code_and_one_line(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    pipeline.end = raising(error)
    assert main(["r.yaml", "-o", "out.onnx"]) == code
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert message in captured
    assert "\n" not in captured
    assert main(["r.yaml", "-o", "out.onnx", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_only_commands_that_go_on_say_so(folder: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out.onnx").write_bytes(b"")
    pipeline.end = raising(KeyboardInterrupt())
    assert main(["validate", "out.onnx"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


@pytest.mark.usefixtures("folder", "pipeline")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml"], "Missing option '-o'"),
        (["-o", "out.onnx"], "Missing argument 'RECIPE'"),
        (["r.yaml", "-o", "out.onnx", "--sed", "3"], "--sed"),
        (["r.yaml", "-o", "out.onnx", "--seed", "three"], "'three' is not a valid integer"),
        (["r.yaml", "extra", "-o", "out.onnx"], "unexpected extra argument"),
        (["validate"], "Missing argument 'FILE'"),
        (["digitz", "-o", "out.onnx"], "digitz: no such recipe; did you mean 'digits'?"),
        (["r.yaml", "-o", "out.trt"], "out.trt: unknown suffix '.trt'; an output ends in .onnx"),
        (["r.yaml", "-o", "out"], "no suffix"),
        (["ranges", "r.yaml", "-o", "out.bundle"], "out.bundle: ranges are measured for one target: -o NAME.onnx"),
        (["r.yaml", "-o", "out.onnx", "--target", "rtx-sm89"], "target rtx-sm89 is written as .plan or .engine"),
        (["r.yaml", "-o", "out.plan", "--target", "cpu"], "target cpu is written as .onnx"),
        (["r.yaml", "-o", "out.plan", "--target", "rtx"], "unknown target 'rtx'"),
        (["r.yaml", "-o", "out.onnx", "--set", "preset=w4"], "--set preset=w4: preset: unknown preset 'w4'"),
    ],
)
def test_wrong_arguments_are_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert message in captured
    assert "\n" not in captured


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("preset: w4a6", "preset: w4a6\nlayers: [{match: '*.to_q', weight: e2m4}]", "did you mean 'e2m3'?"),
        ("preset: w4a6", "preset: w4a6\nlayers: [{match: '*.to_qq'}]", "matches no layer; did you mean"),
        ("preset: w4a6", "preset: w4a6\nlayers: [{match: '*.to_q', group: 100}]", "does not divide its 128 input"),
        ("preset: w4a6", "preset: w4a6\nseed: 3", "seed: unknown key"),
        ("preset: w4a6", "preset: [w4a6", "not valid YAML"),
        ("{weights: model}", "{weights: absent}", "absent does not exist"),
        ("{weights: model}", "{weights: .}", "holds neither config.json"),
        ("{weights: model}", "{weights: r.yaml}", "is a file"),
        ("{prompts: p.safetensors}", "{prompts: p, samples: 0}", "must be at least 1, got 0"),
        ("calibration:", "calibratoin:", "did you mean"),
    ],
)
def test_broken_recipes_in_a_dry_run(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    (folder / "r.yaml").write_text(RECIPE.replace(old, new))
    assert main(["r.yaml", "-o", "out.onnx", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["r.yaml", "-o", "out.plan", "--target", "rtx-sm89", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for fact in (
        "rtx-sm89 (as asked for)",
        "transformer_blocks.0.ff.net.0.proj",
        "10 quantized layers",
        "only a config",
        "expected",
        "activations ",
    ):
        assert fact in text
    assert sorted(folder.rglob("*")) == before
