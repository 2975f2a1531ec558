"""A small transformer with random weights that do matter to its output, prompts, a plan and captured inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from exporter.calibration.capture import CalibrationSet, capture_trajectories
from exporter.calibration.placement import Placement
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.recipe import CalibrationSection

LATENT_SHAPE = (2, 8, 8)
STEPS = 3
TRAJECTORIES = 4

Planner = Callable[..., Plan]


def capture(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection, placement: Placement
) -> CalibrationSet:
    """The trajectories of all tests here, captured where `placement` says."""
    return capture_trajectories(
        model,
        adapter,
        prompts,
        settings,
        NullProgress(),
        trajectories=TRAJECTORIES,
        seed=3,
        latent_shape=LATENT_SHAPE,
        scheduler_config=None,
        placement=placement,
    )


@pytest.fixture(scope="session")
def adapter() -> PixArtAdapter:
    return PixArtAdapter()


@pytest.fixture(scope="session")
def model() -> nn.Module:
    torch.manual_seed(11)
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        in_channels=2,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    with torch.no_grad():
        # Fresh blocks are nearly the identity; larger weights make their roundings visible.
        for name, parameter in transformer.named_parameters():
            if name.startswith("transformer_blocks") and parameter.ndim == 2:
                parameter.mul_(3.0)
    return transformer.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(3, 6)
    mask[1, 4:] = 0
    return Prompts(
        {"encoder_hidden_states": torch.randn(3, 6, 24, generator=generator), "encoder_attention_mask": mask},
        {
            "encoder_hidden_states": torch.randn(1, 6, 24, generator=generator),
            "encoder_attention_mask": torch.ones(1, 6),
        },
    )


@pytest.fixture(scope="session")
def settings() -> CalibrationSection:
    return CalibrationSection(prompts="unused.safetensors", steps=STEPS, guidance=2.0)


@pytest.fixture(scope="session")
def captured(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, settings: CalibrationSection
) -> CalibrationSet:
    return capture(model, adapter, prompts, settings, Placement())


@pytest.fixture(scope="session")
def plan_for(model: nn.Module) -> Planner:
    """Plan the linears whose module paths start with one of the prefixes."""

    def plan(*prefixes: str, group_size: int = 16, activation: str = "e2m3", scales: str = "foldable") -> Plan:
        layers = tuple(
            LayerPlan(
                name=name,
                out_features=linear.out_features,
                in_features=linear.in_features,
                has_bias=linear.bias is not None,
                weight_format="e2m1",
                activation_format=activation,
                group_size=group_size,
                scales=scales if group_size else "channel",
                container="int8",
            )
            for name, linear in model.named_modules()
            if isinstance(linear, nn.Linear) and name.startswith(prefixes or ("transformer_blocks",))
        )
        return Plan(layers=layers, high_precision=(), fp32_bytes=0, expected_bytes=0)

    return plan
