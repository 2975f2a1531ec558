"""Recipes: what loads, and every way in which one can be wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.recipe import Recipe, load_recipe, recipe_to_yaml
from exporter.recipe_file import DATA_PACKAGE, find_recipe, shipped_recipes

SMALLEST = "model: {weights: weights}\npreset: w4a6\ncalibration: {prompts: p.safetensors}\n"


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A recipe with nothing but what a recipe must have."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALLEST)
    return file


def test_defaults_are_filled_in(smallest: Path) -> None:
    recipe = load_recipe(smallest)
    assert recipe.target == "auto"
    assert recipe.calibration.scheduler == "DPMSolverMultistepScheduler"
    assert (recipe.method.name, recipe.method.start, recipe.method.balance) == ("fp4dit", "gptq", True)
    assert recipe.layers == ()


def test_paths_start_from_the_recipe(smallest: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("../small.yaml")
    assert recipe.resolve_path("p.safetensors") == tmp_path / "p.safetensors"
    assert recipe.resolve_path("../up") == tmp_path.parent / "up"
    assert recipe.resolve_path("/absolute") == Path("/absolute")
    assert recipe.resolve_path("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        "pixart_alpha_w4a6",
        "pixart_alpha_256_w4a6",
        "pixart_alpha_1024_w4a6",
        "pixart_sigma_w4a6",
        "hunyuan_dit_v1_1_w4a6",
        "hunyuan_dit_v1_2_w4a6",
        "dit_xl_2_256_w4a6",
        "dit_xl_2_512_w4a6",
        "pixart_alpha_w4a6_fp4dit",
        "pixart_sigma_w4a6_fp4dit",
        "hunyuan_dit_v1_2_w4a6_fp4dit",
    ],
)
def test_shipped_recipes_load_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for spelling in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        recipe = load_recipe(spelling)
        assert recipe.source_dir == shipped_recipes()[name].parent
        assert recipe.model_dump() == load_recipe(shipped_recipes()[name]).model_dump()


def test_a_file_here_goes_before_a_shipped_recipe(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smallest.parent)
    shutil.copy(smallest, "digits.yaml")
    assert find_recipe("digits.yaml") == Path("digits.yaml")


@pytest.mark.parametrize("path", ["digitz", "recipes/digitz.yaml"])
def test_a_missing_recipe_suggests_a_shipped_one(path: str) -> None:
    with pytest.raises(InputError, match="no such recipe; did you mean 'digits'"):
        load_recipe(path)


def test_a_missing_path_is_not_replaced_by_a_shipped_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "digits.yaml")


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds a list"),
        (b"just words\n", "holds a single value"),
        (b"\x80\x02\xff\xfe", "not a UTF-8 text file"),
        (b"a: 1\n" * 300_000, "over 1 MiB"),
        (b"model: [\n", r"broken\.yaml:2: not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.stepz=3", r"calibration\.stepz: unknown key; did you mean 'steps'\?"),
        ("calibrations.steps=3", r"calibrations: unknown key; did you mean 'calibration'\?"),
        ("layers=[{match: a, weight: e2m4}]", r"layers\[0\]\.weight: unknown format 'e2m4'; did you mean 'e2m3'\?"),
        ("layers=[{match: a, weight: e8m0}]", "unknown format 'e8m0'"),
        ("layers=[{match: a, activation: e3m0}]", "unknown activation format 'e3m0'"),
        ("layers=[{weight: e2m1}]", r"layers\[0\]\.match: missing; it is a module path"),
        ("layers=[{match: a, group: -1}]", r"layers\[0\]\.group: must be at least 0, got -1"),
        ("layers=[{match: a, group: 64, scales: channel}]", "group is 64; use `scales: foldable`"),
        ("layers=[{match: a, group: 0, scales: group}]", "needs a group size"),
        ("layers=[{match: a, group: 32, scales: nvfp4}]", "`scales: nvfp4` has groups of 16; drop `group: 32`"),
        ("layers=[{match: a, container: fp4}]", r"layers\[0\]\.container: unknown container 'fp4'; did you mean 'fp8'"),
        ("container=int9", r"container: unknown container 'int9'; did you mean 'int8'"),
        ("layers=[{match: a, weight: none, activation: e2m3}]", "keeps the layer in high precision"),
        (
            "layers=[{match: a, weight: none, low_rank: 8}]",
            "keeps the layer in high precision: drop low_rank, hadamard, shift and output",
        ),
        ("layers=[{match: a, hadamard: 32}]", r"layers\[0\]\.hadamard: unknown hadamard 32; valid: 0, 4, 16, 64, 256"),
        (
            "layers=[{match: a, weight: none, output: e4m3}]",
            "keeps the layer in high precision: drop low_rank, hadamard, shift and output",
        ),
        (
            "layers=[{match: a, output: e4m4}]",
            r"layers\[0\]\.output: unknown output format 'e4m4'; did you mean 'e4m3'",
        ),
        ("layers=[{match: a, output: e3m0}]", "unknown output format 'e3m0'"),
        (
            "layers=[{match: a, output: e4m3, output_group: -1}]",
            r"layers\[0\]\.output_group: must be at least 0, got -1",
        ),
        ("layers=[{match: a, output: ue2m4}]", r"layers\[0\]\.output: unknown output format 'ue2m4'"),
        (
            "layers=[{match: a, shift: gelu}]",
            "`shift: gelu` needs activations without a sign, for example `activation: ue2m4`",
        ),
        ("layers=[{match: a, shift: gelu, activation: e2m3}]", "needs activations without a sign"),
        ("layers=[{match: a, weight: none, shift: gelu}]", "drop low_rank, hadamard, shift and output"),
        ("layers=[{match: a, activation: ue2m4, shift: silu}]", r"layers\[0\]\.shift: unknown shift 'silu'"),
        ("layers=[{match: a, activation: ue2m2, hadamard: 16}]", "gives inputs of both signs, and ue2m2 has none"),
        ("layers=[{match: a, output_group: 64}]", "`output_group: 64` is for outputs that are quantized"),
        ("method.balance=2", r"method\.balance: unknown balance 2; valid: false, true, exact"),
        ("method.efort=fast", r"method\.efort: unknown key; did you mean 'effort'\?"),
        ("method.iterations=null", r"method\.iterations: expected a whole number, got nothing"),
        ("method=gptq", "method: expected a mapping of keys to values, got 'gptq'"),
        ("layers=[{match: a, low_rank: -1}]", r"layers\[0\]\.low_rank: must be at least 0, got -1"),
        ("layers=e2m1", "layers: expected a list, got 'e2m1'"),
        ("target=rtx-sm88", "unknown target 'rtx-sm88'; did you mean 'rtx-sm89'"),
        ("preset=w4a5", "unknown preset 'w4a5'; did you mean 'w4a6'"),
        ("model.family=flux", "unknown family 'flux'"),
        ("calibration.scheduler=DDIM", "did you mean 'DDIMScheduler'"),
        ("calibration.samples=0", "must be at least 1, got 0"),
        ("calibration.steps=ten", "expected a whole number, got 'ten'"),
        ("calibration.steps=true", "expected a whole number, got true"),
        ("calibration.steps=20.5", "expected a whole number, got 20.5"),
        ("calibration.guidance=.nan", "expected a finite number"),
        ("calibration.seed=-1", "must be at least 0"),
        ("calibration=null", "calibration: expected a mapping of keys to values, got nothing"),
        ("model.weights=''", r"model\.weights: must not be empty"),
        ("method.beta_end=30", "beta_end 30.0 is above beta_start 20.0"),
        ("evaluation.samples=0", "must be at least 1"),
        ("preset", r"expected key\.path=value"),
        ("a..b=1", r"expected key\.path=value"),
        ("calibration.steps=[1", "not valid YAML"),
        ("layers.0.weight=e3m0", "layers has 0 entries"),
        ("preset.x=1", "preset is a single value"),
        ("model.0=1", "model is no list"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_flag(smallest: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(smallest, [override])
    assert str(caught.value).startswith(f"--set {override}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("preset: w4a6", "", "nothing would be quantized"),
        ("preset: w4a6", "presett: w4a6", r"presett: unknown key; did you mean 'preset'\?"),
        ("{prompts: p.safetensors}", "{}", r"calibration\.prompts: missing; it is the safetensors file"),
        ("{weights: weights}", "3", "model: expected a mapping of keys to values, got 3"),
        ("preset: w4a6", "1: 2", "1"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_file(smallest: Path, old: str, new: str, message: str) -> None:
    smallest.write_text(SMALLEST.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(smallest)
    assert str(caught.value).startswith(f"{smallest}: ")
    assert "\n" not in str(caught.value)


def test_several_problems_are_counted(smallest: Path) -> None:
    with pytest.raises(InputError, match=r"\(and 1 more\)"):
        load_recipe(smallest, ["calibration.steps=0", "calibration.samples=0"])


def test_overrides_set_numbers_lists_and_entries(smallest: Path) -> None:
    recipe = load_recipe(
        smallest,
        [
            "layers=[{match: 'a.*', weight: e2m1}, {match: b, weight: none}]",
            "layers.0.weight=e3m0",
            "method.learning_rate=1e-3",
            "evaluation.samples=10",
            "calibration.steps=5",
            "calibration.steps=6",
        ],
    )
    assert [rule.weight for rule in recipe.layers] == ["e3m0", "none"]
    assert recipe.method.learning_rate == 0.001
    assert recipe.evaluation.samples == 10
    assert recipe.calibration.steps == 6


def test_target_and_seed_come_last_and_are_blamed(smallest: Path) -> None:
    recipe = load_recipe(smallest, ["target=cpu", "calibration.seed=3"], target="rtx-sm86", seed=7)
    assert (recipe.target, recipe.calibration.seed) == ("rtx-sm86", 7)
    with pytest.raises(InputError, match=r"^--target cpux: target: unknown target 'cpux'; did you mean 'cpu'"):
        load_recipe(smallest, target="cpux")
    with pytest.raises(InputError, match=r"^--seed -1: calibration\.seed: must be at least 0"):
        load_recipe(smallest, seed=-1)


def test_the_resolved_recipe_works_from_another_folder(smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    recipe = load_recipe(smallest, ["evaluation.classifier=c.onnx", "layers=[{match: a, group: 64}]"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "out.recipe.yaml").write_text(recipe_to_yaml(recipe))
    again = load_recipe(other / "out.recipe.yaml")
    assert Path(again.calibration.prompts) == tmp_path / "p.safetensors"
    assert Path(again.model.weights) == tmp_path / "weights"
    assert Path(again.evaluation.classifier or "") == tmp_path / "c.onnx"
    assert again.layers == recipe.layers
    assert recipe_to_yaml(again).splitlines()[1:] == recipe_to_yaml(recipe).splitlines()[1:]


def test_a_hub_id_stays_a_hub_id_in_the_resolved_recipe(smallest: Path) -> None:
    recipe = load_recipe(smallest, ["model.weights=PixArt-alpha/PixArt-XL-2-512x512"])
    assert "weights: PixArt-alpha/PixArt-XL-2-512x512\n" in recipe_to_yaml(recipe)


def test_a_recipe_can_be_made_in_python_and_not_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.model_validate({"model": {"weights": "w"}, "preset": "w4a6", "calibration": {"prompts": "p"}})
    assert recipe.resolve_path("p") == tmp_path / "p"
    with pytest.raises(ValueError, match="frozen"):
        recipe.preset = "w4a8"


def test_an_installed_copy_finds_its_recipes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for package in ("exporter", "plugins"):
        shutil.copytree(root / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "site" / DATA_PACKAGE).mkdir()
    shutil.copy(root / "recipes" / "digits.yaml", tmp_path / "site" / DATA_PACKAGE)
    code = "from exporter.recipe import load_recipe; print(load_recipe('digits').source_dir)"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == str(tmp_path / "site" / DATA_PACKAGE)


def test_a_path_on_the_command_line_is_the_current_folder_s_if_it_is_there(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "weights").mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = load_recipe(smallest, ["model.weights=weights", "calibration.prompts=elsewhere.safetensors"])
    assert recipe.resolve_path(recipe.model.weights) == here / "weights"
    assert recipe.resolve_path(recipe.calibration.prompts) == smallest.parent / "elsewhere.safetensors"
