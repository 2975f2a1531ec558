"""The whole job for the families beside PixArt: what the command makes of tiny random models, gate included."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file
from torch import nn

from exporter.cli import main
from exporter.device.requirements import missing_builder
from exporter.metrics import read_metrics
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.loading import load_transformer
from exporter.passes.layer_table import read_layer_table
from exporter.runtime import OnnxSession
from exporter.targets import TARGETS
from tests.exporter.models.small_families import HUNYUAN_KEYS, dit, hunyuan, prompt_tensors, strengthen

METHOD = """
preset: w4a6
layers:
  - {match: "*.ff.net.2", group: 32, low_rank: 4, hadamard: 16}
  - {match: "*.to_?", group: 32, output: e4m3, output_group: 32}
  - {match: "*blocks.*", group: 32}
method: {name: fp4dit, iterations: 2, batch_size: 4, balance: true}
evaluation: {trajectories: 1, grid: 2}
"""
HUNYUAN = """
model: {family: hunyuan, weights: model}
calibration: {prompts: prompts.safetensors, scheduler: DDPMScheduler, steps: 2, samples: 2}
"""
DIT = """
model: {family: dit, weights: model}
calibration: {classes: [3, 7], scheduler: DDIMScheduler, steps: 2, samples: 2, guidance: 4.0}
"""


def hunyuan_job(folder: Path) -> None:
    # Not strengthened: with weights twice as large its skips amplify every rounding, W4A6 to 13 dB, W8A8 in E4M3 to 22,
    # in E3M4 to 27, INT8 weights alone to 40; the gate passes all the same.
    model = hunyuan()
    model.save_pretrained(folder / "model" / "transformer")
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(folder / "model" / "scheduler")
    save_file(prompt_tensors(HUNYUAN_KEYS), folder / "prompts.safetensors")
    (folder / "job.yaml").write_text(HUNYUAN + METHOD)


def dit_job(folder: Path) -> None:
    model = dit()
    strengthen(model)
    # As in the published checkpoints, every block stores the same embedders.
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    model.save_pretrained(folder / "model" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "model" / "scheduler")
    (folder / "job.yaml").write_text(DIT + METHOD)


JOBS = {"hunyuan": hunyuan_job, "dit": dit_job}
LAYERS = {"hunyuan": 45, "dit": 14}


@pytest.fixture(scope="module", params=JOBS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The family and the .onnx that the command made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    JOBS[request.param](folder)
    output = folder / "out.onnx"
    assert main([str(folder / "job.yaml"), "-o", str(output), "--quiet"]) == 0
    return request.param, output


@pytest.mark.slow
def test_the_gate_passes_with_every_layer_of_the_blocks_quantized(exported: tuple[str, Path]) -> None:
    family, output = exported
    metrics = read_metrics(output.with_name("out.metrics.json"))
    assert metrics["fidelity"]["passed"]
    assert metrics["quality"]["eps_snr_db_mean"] > 15
    layers = [entry.layer for entry in read_layer_table(onnx.load(output.with_name("out.work") / "exported.cpu.onnx"))]
    assert len(layers) == LAYERS[family]
    assert all("blocks." in name for name in layers)


@pytest.mark.slow
def test_attention_is_one_operator_each(exported: tuple[str, Path]) -> None:
    family, output = exported
    kinds = Counter(node.op_type for node in onnx.load(output).graph.node)
    attentions = {"hunyuan": 8, "dit": 2}[family]
    assert kinds["MultiHeadAttention"] == attentions
    # The pooling of Hunyuan's caption has a single query and stays as it is.
    assert kinds["Softmax"] == (1 if family == "hunyuan" else 0)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_builder(TARGETS["rtx-sm89"])), reason="needs tensorrt-rtx")
def test_an_engine_is_built_from_the_same_work(exported: tuple[str, Path]) -> None:
    _, output = exported
    engine = output.with_suffix(".plan")
    command = [str(output.with_name("job.yaml")), "-o", str(engine), "--target", "rtx-sm89", "--quiet"]
    assert main([*command, "--work-dir", str(output.with_name("out.work"))]) == 0
    assert engine.stat().st_size > 0
    assert read_metrics(output.with_name("out.metrics.json"))["fidelity"]["passed"]


@pytest.mark.slow
def test_the_graph_takes_the_familys_inputs_at_any_batch(exported: tuple[str, Path]) -> None:
    family, output = exported
    session = OnnxSession(output)
    adapter = HunyuanAdapter() if family == "hunyuan" else DiTAdapter()
    model = load_transformer(output.parent / "model" / "transformer", adapter)
    assert {spec.name for spec in session.inputs} == set(adapter.input_names(model))
    for batch in (1, 3):
        inputs = adapter.example_inputs(model, batch=batch, tokens=0)
        found = session.run(inputs.as_numpy())["sample"]
        with torch.no_grad():
            expected = adapter.forward(model, inputs).numpy()
        assert found.shape == expected.shape
        # Other inputs than the two trajectories that it was calibrated on.
        assert ((found - expected) ** 2).mean() < 0.1 * (expected**2).mean()


def test_equal_embedders_are_one_and_others_stay(tmp_path: Path) -> None:
    dit_job(tmp_path)
    shared = load_transformer(tmp_path / "model" / "transformer", DiTAdapter())
    names = [f"transformer_blocks.{index}.norm1.emb" for index in range(2)]
    assert shared.get_submodule(names[0]) is shared.get_submodule(names[1])
    dit().save_pretrained(tmp_path / "other")
    other = load_transformer(tmp_path / "other", DiTAdapter())
    assert other.get_submodule(names[0]) is not other.get_submodule(names[1])


def refused(folder: Path, job: Callable[[Path], None], *changes: str) -> int:
    job(folder)
    settings = [word for change in changes for word in ("--set", change)]
    return main([str(folder / "job.yaml"), "-o", str(folder / "x.onnx"), "--quiet", *settings])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("hunyuan", ["model.family=pixart"], "supported: pixart (PixArtTransformer2DModel), hunyuan"),
        ("hunyuan", ["calibration.classes=[1]"], "calibration.classes: family hunyuan draws prompts"),
        ("dit", ["calibration.prompts=p.safetensors"], "family dit draws class labels and needs no embeddings"),
        ("dit", ["calibration.classes=[10]"], "calibration.classes: 10 is over the model's last class, 9"),
        ("dit", ["layers.0.match='*.norm1.emb.*'"], "matches no linear layer"),
        ("hunyuan", ["layers.0.match=time_extra_emb.pooler.*"], "matches no linear layer"),
    ],
)
def test_what_does_not_fit_the_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, changes: list[str], message: str
) -> None:
    assert refused(tmp_path, JOBS[family], *changes) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_hunyuan_without_its_scheduler_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hunyuan_job(tmp_path)
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").unlink()
    assert main([str(tmp_path / "job.yaml"), "-o", str(tmp_path / "x.onnx"), "--quiet"]) == 2
    assert "scheduler_config.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (hunyuan, {"num_layers": 3}, "skips pair the blocks, so it must be even"),
        (hunyuan, {"hidden_size": 32}, "hidden_size is 32, but num_attention_heads"),
        (hunyuan, {"attention_head_dim": 30, "hidden_size": 60}, "rotary embeddings need a multiple of 4"),
        (hunyuan, {"cross_attention_dim_t5": 20}, "its pooling has 8 heads"),
        (hunyuan, {"patch_size": 3}, "is not a multiple of patch_size 3"),
        (dit, {"out_channels": 4}, "out_channels is 4; a noise prediction has in_channels"),
        (dit, {"norm_type": "layer_norm"}, "norm_type"),
    ],
)
def test_configs_that_cannot_be_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], nn.Module],
    changes: dict[str, object],
    message: str,
) -> None:
    family = "hunyuan" if make is hunyuan else "dit"
    JOBS[family](tmp_path)
    file = tmp_path / "model" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert main([str(tmp_path / "job.yaml"), "-o", str(tmp_path / "x.onnx"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error
