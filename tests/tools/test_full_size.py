"""The tools that measure models of full size, tried on a small one; their pages, on made-up figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from diffusers import HunyuanDiTPipeline
from safetensors.torch import load_file

from exporter.embed import embed
from exporter.layer_section import LayerRule
from exporter.recipe import load_recipe
from tools import measured_export
from tools.full_size import ExportUse, StageUse, fastest_of, markdown, watch, weight_bytes
from tools.full_size_commands import COMMANDS, Command, CommandUse, measured, remove
from tools.full_size_commands import markdown as commands_markdown
from tools.full_size_models import MODELS, FullSize, make_model
from tools.full_size_pipeline import PIPELINES, make_parts

PIXART, HUNYUAN = MODELS["pixart"], MODELS["hunyuan"]
SMALL = replace(
    PIXART,
    config={
        **PIXART.config,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "caption_channels": 32,
        "sample_size": 8,
    },
    resolution=8,
    prompts={"": (6, 32)},
)
SMALL_HUNYUAN = replace(
    HUNYUAN,
    config={
        **HUNYUAN.config,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "hidden_size": 16,
        "sample_size": 8,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
    },
    resolution=8,
    prompts={"": (77, 12), "_2": (256, 16)},
)
# What each text encoder of Hunyuan's has instead of its published widths.
NARROW = (
    {"vocab_size": 96, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20},
    {"vocab_size": 96, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_heads": 4},
)
STAGES = (StageUse("load", 3.0, 2_000_000_000), StageUse("validate", 60.0, 0), StageUse("build", 2.0, 1_000_000_000))
USE = ExportUse("cpu", 100.0, 70.0, 2_000_000_000, 300_000_000, 0, (*STAGES, StageUse("evaluate", 30.0, 1)))
RTX = replace(USE, target="rtx-sm89", builder_bytes=3_000_000_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `tools.full_size` makes it, of one small block."""
    folder = tmp_path_factory.mktemp("small")
    make_model(SMALL, 1, folder)
    return folder


def test_an_export_leaves_when_its_stages_began_and_ended(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, spans = small / "cpu.onnx", small / "cpu.spans.json"
    monkeypatch.setattr(sys, "argv", ["measured_export", str(small / "recipe.yaml"), str(output), "cpu", str(spans)])
    assert measured_export.main() == 0
    found = json.loads(spans.read_text())
    names, times = [name for name, _, _ in found], [time for _, *both in found for time in both]
    shown = ["load", "calibrate", "validate", "build", "evaluate"]
    assert [name for name in names if name in shown] == shown
    assert times == sorted(times)
    assert output.stat().st_size < weight_bytes(small)


def test_a_process_is_watched_with_what_it_starts() -> None:
    child = "import time; block = bytearray(150_000_000); time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", parent])
    samples = watch(process)
    assert process.returncode == 3
    assert max(below for _, _, below in samples) > 150_000_000
    assert all(whole > below for _, whole, below in samples[1:-1])


def rows(section: str, first: str) -> dict[str, list[str]]:
    """Cells by the row's first one, of the table that the heading cell `first` begins."""
    table = section.partition(f"| {first} |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in cells}


def aims(model: FullSize, use: ExportUse) -> dict[str, list[str]]:
    return rows(markdown(model, 2_000_000_000, [use]), "aim")


def test_stages_stand_side_by_side_with_their_share_of_the_weights() -> None:
    found = rows(markdown(PIXART, 2_000_000_000, [USE, replace(RTX, peak_bytes=5_000_000_000)]), "stage")
    assert found["load"] == ["3.0", "1.00", "3.0", "1.00"]
    assert found["validate"] == ["60.0", "–", "60.0", "–"]
    assert found["**all**"] == ["**100.0**", "**1.00**", "**100.0**", "**2.50**"]


def test_what_is_met_says_so_and_what_is_missed_says_by_how_much_and_why() -> None:
    model = replace(PIXART, most_seconds=100, most_bytes=2e9)
    assert {row[-1] for row in aims(model, USE).values()} == {"met"}
    missed = aims(replace(model, most_seconds=75, most_bytes=1.5e9), replace(USE, output_bytes=400_000_000))
    assert missed["cpu: output written and validated in at most 75 s"] == ["70 s", "met"]
    assert missed["cpu: output, evaluation and report in at most 75 s"] == [
        "100 s",
        "**missed** by 25 s: the longest are validate (60 s), evaluate (30 s), load (3 s)",
    ]
    assert missed["cpu: at most 1.5 GB resident"][1].startswith("**missed** by 0.5 GB: most in load (2.0 GB), build")
    assert missed["cpu: file at most 0.17 of FP32"] == [
        "0.200",
        "**missed** by 0.030: what stays in high precision is FP32",
    ]
    longest = aims(replace(model, most_seconds=60), USE)["cpu: output written and validated in at most 60 s"][1]
    assert "evaluate" not in longest


def test_the_fastest_of_several_exports_says_how_long_the_others_took() -> None:
    slow = replace(USE, written_seconds=90.0, peak_bytes=2_500_000_000)
    use = fastest_of([slow, USE])
    assert (use.written_seconds, use.peak_bytes) == (70.0, 2_500_000_000)
    assert "cpu: the fastest of 2 exports (70, 90 s)" in markdown(PIXART, 1, [use])
    assert "fastest" not in markdown(PIXART, 1, [fastest_of([USE])])


def test_what_the_builder_takes_is_said_where_there_is_one() -> None:
    assert "at most 3.0 GB of what is resident" in markdown(PIXART, 1, [RTX])
    assert "builder" not in markdown(PIXART, 1, [USE])


def test_a_command_is_told_by_its_own_words_or_by_its_failure() -> None:
    command = Command("validate x.onnx", r"^fidelity: (\w+)", r"it \1")
    assert command.result(0, "one\nfidelity:  passed\nfidelity: passed") == "it passed"
    assert (
        command.result(4, "fidelity: passed\nerror: layer a deviates\n\n") == "**exit code 4**: error: layer a deviates"
    )
    assert command.result(0, "") == "**exit code 0**: nothing was printed"


def test_a_command_that_fails_is_a_row_and_its_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    command = Command("build nothing.onnx -o engine.plan", "^engine", used_up=("gone", "folder"))
    (tmp_path / "folder").mkdir()
    use = measured(command, tmp_path, 7)
    assert use.words == command.words
    assert use.peak_bytes > 0
    assert use.gave.startswith("**exit code 2**: error: ")
    assert use.gave.partition(": ")[2] in (tmp_path / "commands" / "07.txt").read_text()
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("name", "title", "said"),
    [
        ("pixart", "PixArt-α, 1 of 28 blocks", "which has T5-XXL's width and 2 of its 24 layers, in BF16."),
        ("hunyuan", "Hunyuan-DiT 1.2, 1 of 40 blocks", "of mT5-XL and 2 of the 24 layers of each, in BF16."),
    ],
)
def test_the_section_of_commands_has_every_command_and_its_figures(name: str, title: str, said: str) -> None:
    uses = [CommandUse(command.words, 61.4, 1_240_000_000, "fine") for command in COMMANDS]
    section = commands_markdown(name, 1, 2, uses)
    assert section.startswith(f"### The other commands: {title}\n")
    assert said in section
    found = rows(section, "`fp4export …`")
    assert list(found) == [f"`{command.words}`" for command in COMMANDS]
    assert all(row == ["61", "1.2", "fine"] for row in found.values())


def test_removing_leaves_other_files_alone(tmp_path: Path) -> None:
    for name in ("a.work", "b.work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove(tmp_path, ("a.work", "absent"))
    assert [path.name for path in tmp_path.iterdir()] == ["b.work"]


def test_text_encoders_of_all_layers_have_the_published_sizes() -> None:
    assert PIPELINES["pixart"].text_encoder_bytes(24) == pytest.approx(2 * 4.76e9, rel=0.01)
    assert PIPELINES["hunyuan"].text_encoder_bytes(24) == pytest.approx(2 * (0.352e9 + 1.67e9), rel=0.01)


def test_hunyuan_s_pipeline_is_diffusers_own_and_encodes_captions_with_both_text_encoders(tmp_path: Path) -> None:
    make_model(SMALL_HUNYUAN, 2, tmp_path)
    published = PIPELINES["hunyuan"]
    encoders = zip(published.text_encoders, NARROW, strict=True)
    shape = replace(
        published,
        autoencoder={**published.autoencoder, "block_out_channels": (8,) * 4, "norm_num_groups": 2},
        text_encoders=tuple(replace(encoder, config={**encoder.config, **narrow}) for encoder, narrow in encoders),
    )
    model, prompts = tmp_path / "model", tmp_path / "captions.txt"
    assert shape.text_encoder_layers(model) == 0
    make_parts(shape, model, 1)
    make_parts(shape, model, 2)
    make_parts(shape, model, 0)
    assert shape.text_encoder_layers(model) == 2
    pipeline = HunyuanDiTPipeline.from_pretrained(model, local_files_only=True)
    encoders_read = (pipeline.text_encoder, pipeline.text_encoder_2)
    assert [type(part).__name__ for part in encoders_read] == ["BertModel", "T5EncoderModel"]
    prompts.write_text("a cat, asleep\na tree\n")
    found = load_file(embed(str(tmp_path / "recipe.yaml"), prompts, tmp_path / "embedded.safetensors"))
    for suffix, (tokens, width) in SMALL_HUNYUAN.prompts.items():
        assert found[f"prompt_embeds{suffix}"].shape == (2, tokens, width)
    # Every character is a token: none is unknown, and [CLS] and [SEP], or </s>, stand around them.
    assert found["prompt_attention_mask"].sum(dim=1).tolist() == [11 + 2, 5 + 2]
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert tokenizer.unk_token_id not in tokenizer("a cat, asleep").input_ids


def test_hunyuan_s_rules_are_those_of_its_shipped_recipe() -> None:
    (rule,) = load_recipe("hunyuan_dit_v1_2_w4a6").layers
    assert [rule] == [LayerRule.model_validate(entry) for entry in yaml.safe_load(MODELS["hunyuan"].layers)]
