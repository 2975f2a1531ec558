"""The dry run: the whole plan from a config alone, and nothing written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exporter.describe import Description, describe, exactness, print_description
from exporter.errors import InputError
from exporter.recipe import load_recipe

# PixArt's own widths, two blocks.
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "_diffusers_version": "0.22.0",
    "attention_head_dim": 72,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "in_channels": 4,
    "num_attention_heads": 16,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "use_linear_projection": False,
}
LINEARS_PER_BLOCK = 10


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A pipeline's directory that holds a config and no weights."""
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(PIXART))
    return folder


def printed(description: Description) -> str:
    """What the command would print."""
    stream = io.StringIO()
    print_description(description, Console(file=stream, width=160))
    return stream.getvalue()


def described(recipe: str, weights: Path, output: Path, *overrides: str, **fields: Any) -> Description:
    """The description of a recipe with other weights."""
    return describe(load_recipe(recipe, [f"model.weights={weights}", *overrides], **fields), output)


@pytest.mark.parametrize("recipe", ["pixart_alpha_w4a6", "pixart_sigma_w4a6"])
@pytest.mark.parametrize("target", ["cpu", "rtx-sm86", "rtx-sm89", "rtx-sm120", "orin", "h100", "b200"])
def test_the_pixart_recipes_plan_on_every_kind_of_target(recipe: str, target: str, config_only: Path) -> None:
    output = config_only.parent / ("out.onnx" if target == "cpu" else "out.plan")
    description = described(recipe, config_only, output, target=target)
    layers = description.plan.layers
    assert len(layers) == 2 * LINEARS_PER_BLOCK
    assert {layer.container for layer in layers} == {"int8"}
    assert {layer.weight_format for layer in layers} == {"e2m1" if "alpha" in recipe else "e1m2"}


# What the file says it takes to run on engines with native kernels.
NATIVE = ("layers.0.scales=channel", "layers.0.group=0", "layers.1.scales=foldable")


@pytest.mark.parametrize(
    ("target", "changes", "container"),
    [("cpu", (), "fp32"), ("h100", ("kernels=plugin",), "int8"), ("orin", NATIVE, "int8")],
)
@pytest.mark.parametrize(
    ("recipe", "base"),
    [
        ("pixart_alpha_w4a6_fp4dit", "e2m1"),
        ("pixart_sigma_w4a6_fp4dit", "e1m2"),
        ("hunyuan_dit_v1_2_w4a6_fp4dit", "e2m1"),
    ],
)
def test_published_settings_plan_from_a_config_alone(
    recipe: str, base: str, target: str, changes: tuple[str, ...], container: str, config_only: Path
) -> None:
    if "hunyuan" in recipe:
        config = {"in_channels": 4, "num_attention_heads": 16, "patch_size": 2, **HUNYUAN}
        (config_only / "transformer" / "config.json").write_text(json.dumps(config))
    output = config_only.parent / ("out.onnx" if target == "cpu" else "out.plan")
    layers = described(recipe, config_only, output, *changes, target=target).plan.layers
    assert {layer.container for layer in layers} == {container}
    assert {layer.activation_format for layer in layers} == {"e2m3"}
    first = [layer for layer in layers if layer.name.endswith("ff.net.0.proj")]
    assert {layer.weight_format for layer in first} == {"e3m0"}
    assert {layer.weight_format for layer in layers if layer not in first} == {base}
    if changes != NATIVE:
        assert {(layer.scales, layer.group_size) for layer in layers} == {("group", 128)}


def test_published_activations_of_eight_bits_run_on_the_cpu(config_only: Path) -> None:
    changes = ("layers.0.activation=e3m4", "layers.1.activation=e3m4")
    description = described("pixart_alpha_w4a6_fp4dit", config_only, config_only.parent / "x.onnx", *changes)
    assert {layer.activation_format for layer in description.plan.layers} == {"e3m4"}


def test_quantized_outputs_are_printed_with_their_groups(config_only: Path) -> None:
    rules = "layers=[{match: '*.to_?', activation: e4m3, output: e4m3, output_group: 72}, {match: '*.to_out.0'}]"
    text = printed(described("pixart_alpha_w4a6", config_only, config_only.parent / "x.onnx", rules))
    assert "transforms 12 with an output in e4m3/72" in text
    assert text.count("e4m3/72") == 1 + 12


def test_open_formats_are_printed_with_their_candidates(config_only: Path) -> None:
    rules = "layers=[{match: '*.ff.*', weight: auto}]"
    text = printed(described("pixart_alpha_w4a6", config_only, config_only.parent / "x.onnx", rules))
    assert (
        "weight: auto: 4 layers will be one of e2m1 (foldable scales), e1m2 (foldable scales), e3m0 (channel scales)"
    ) in text


HUNYUAN = {
    "_class_name": "HunyuanDiT2DModel",
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "mlp_ratio": 4.3637,
    "num_layers": 4,
    "sample_size": 128,
}
DIT = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "out_channels": 8}


@pytest.mark.parametrize("target", ["cpu", "rtx-sm89", "orin"])
@pytest.mark.parametrize(
    ("recipe", "config", "layers", "kept"),
    [
        ("hunyuan_dit_v1_1_w4a6", HUNYUAN, 4 * 11 + 1 + 2, "time_extra_emb.style_embedder"),
        (
            "hunyuan_dit_v1_2_w4a6",
            {**HUNYUAN, "use_style_cond_and_image_meta_size": False},
            4 * 11 + 1 + 2,
            "time_extra_emb.pooler.q_proj",
        ),
        ("dit_xl_2_256_w4a6", {**DIT, "sample_size": 32}, 2 * 7, "proj_out_1"),
        ("dit_xl_2_512_w4a6", {**DIT, "sample_size": 64}, 2 * 7, "transformer_blocks.1.norm1.emb.class_embedder"),
    ],
)
def test_the_recipes_of_other_families_plan_from_a_config_alone(
    recipe: str, config: dict[str, Any], layers: int, kept: str, target: str, tmp_path: Path
) -> None:
    config = {"in_channels": 4, "num_attention_heads": 16, "patch_size": 2, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = described(recipe, tmp_path, tmp_path / ("x.onnx" if target == "cpu" else "x.plan"), target=target)
    assert len(description.plan.layers) == layers
    assert any(name.startswith(kept) for name, _ in description.plan.high_precision)
    assert "holds no safetensors" in description.warnings[0]


def test_everything_is_printed_and_nothing_written(config_only: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    description = described("pixart_alpha_w4a6", config_only, tmp_path / "absent" / "out.onnx")
    text = printed(description)
    for layer in description.plan.layers:
        assert layer.name in text
    for fact in (
        "cpu (auto: .onnx runs in ONNX Runtime)",
        "1152 x 4608",
        "foldable",
        "e2m3",
        "int8",
        "25.0 of 31",
        "int8: e2m1 weights, e2m3 activations: exact: sums of 4608 products stay within 33177600",
        "caption_projection.linear_1",
        "in FP32",
        "warning: ",
        "holds no safetensors, only a config",
        "mkdir -p",
        "pixart_alpha_prompts.safetensors does not exist",
    ):
        assert fact in text
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_add_up(config_only: Path, tmp_path: Path) -> None:
    plan = described("pixart_alpha_w4a6", config_only, tmp_path / "out.onnx").plan
    kept = sum(count for _, count in plan.high_precision) * 4
    assert plan.fp32_bytes == kept + sum(layer.fp32_bytes for layer in plan.layers)
    assert 0.125 < (plan.expected_bytes - kept) / (plan.fp32_bytes - kept) < 0.14


def test_embedders_that_all_blocks_store_may_become_one(tmp_path: Path) -> None:
    config = {**DIT, "in_channels": 4, "num_attention_heads": 16, "patch_size": 2, "sample_size": 32, "num_layers": 28}
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = described("dit_xl_2_256_w4a6", tmp_path, tmp_path / "x.onnx", target="cpu")
    # Timestep: 256 -> 1152 -> 1152 with biases; classes: 1001 x 1152.
    assert description.repeated_bytes == 27 * 4 * (257 * 1152 + 1153 * 1152 + 1001 * 1152)
    assert "0.258" in printed(description)
    assert "or 475.2 MB (0.176) where all blocks store the same embedders" in printed(description)


def test_a_config_that_is_not_pixart_is_refused(config_only: Path, tmp_path: Path) -> None:
    file = config_only / "transformer" / "config.json"
    file.write_text(json.dumps({**PIXART, "_class_name": "UNet2DModel"}))
    with pytest.raises(InputError, match=r"config\.json: _class_name is 'UNet2DModel'.*supported: pixart"):
        described("pixart_alpha_w4a6", config_only, tmp_path / "out.onnx")


def test_block_scaling_states_no_exactness(config_only: Path) -> None:
    description = described(
        "pixart_alpha_w4a6",
        config_only,
        config_only.parent / "out.plan",
        "preset=nvfp4",
        "layers=[{match: '*.ff.net.0.proj', weight: e3m0, scales: channel, activation: e2m3}]",
        target="rtx-sm120",
    )
    row = next(line for line in printed(description).splitlines() if "transformer_blocks.0.attn1.to_q" in line)
    assert row.count("–") == 2
    # The rule keeps one layer of each block in E3M0 with channel scales, of which exactness is stated.
    assert [line.split(",")[0] for line in exactness(description.plan)] == ["int8: e3m0 weights"]


def test_a_cpu_without_vnni_is_warned_of(config_only: Path, tmp_path: Path) -> None:
    asked = ("pixart_alpha_w4a6", config_only, tmp_path / "out.onnx")
    assert "VNNI" in printed(described(*asked, "preset=w4a8_int", "layers=[]"))
    assert "VNNI" not in printed(described(*asked, "layers=[]"))
