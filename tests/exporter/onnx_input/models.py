"""ONNX models as other tools write them: by hand, and by torch.onnx."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import PixArtTransformer2DModel
from onnx import TensorProto, helper, numpy_helper
from torch import nn

WIDTH, TOKENS = 64, 6


@dataclass
class HandMade:
    """Collects nodes; `x` [batch, TOKENS, WIDTH], or [batch, WIDTH] where `rank` is 2, is the input."""

    rank: int = 3
    kind: int = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def random(self, name: str, *shape: int, kind: int | None = None, seed: int = 0) -> str:
        """An initializer of normal numbers, as small as weights are."""
        rng = np.random.default_rng([seed, *name.encode()])
        dtype = helper.tensor_dtype_to_np_dtype(kind or self.kind)
        array = (rng.standard_normal(shape) / 8).astype(dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def on_grid(self, name: str, *shape: int, kind: int | None = None) -> str:
        """An initializer of E2M1 values times 1/32, which one scale per channel quantizes without loss."""
        rng = np.random.default_rng([*name.encode()])
        grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32) / 32
        dtype = helper.tensor_dtype_to_np_dtype(kind or self.kind)
        array = (rng.choice(grid, shape) * rng.choice([-1, 1], shape)).astype(dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op_type: str, *inputs: str, output: str, name: str = "", **attributes: Any) -> str:
        node = helper.make_node(op_type, inputs, [output], name=name, **attributes)
        self.nodes.append(node)
        return output

    def model(self, *outputs: str, opset: int = 21, extra_domain: str = "") -> onnx.ModelProto:
        shape = ["batch", TOKENS, WIDTH] if self.rank == 3 else ["batch", WIDTH]
        x = helper.make_tensor_value_info("x", self.kind, shape)
        results = [helper.make_tensor_value_info(name, self.kind, [None] * self.rank) for name in outputs]
        graph = helper.make_graph(self.nodes, "hand_made", [x], results, self.initializers)
        imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(extra_domain, 1)] if extra_domain else [])
        return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 19 else 10)


def matmul_and_add(layer: str = "fc", **options: Any) -> onnx.ModelProto:
    """x → MatMul → Add, the weight stored [K, N]."""
    made = HandMade(**options)
    product = made.node("MatMul", "x", made.random(f"{layer}.weight", WIDTH, 32), output="product")
    return made.model(made.node("Add", product, made.random(f"{layer}.bias", 32), output="y"))


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


class Block(nn.Module):
    """Attention with its own product of activations, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        scores = self.to_q(hidden) @ self.to_k(hidden).transpose(-1, -2)
        x = x + torch.softmax(scores / 8, -1) @ self.to_v(hidden)
        return x + self.ff(x)


class TinyDiT(nn.Module):
    """Patches and a timestep in, noise out, in the layout that diffusion transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(8, WIDTH)
        self.t_embedder = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.final_layer = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None].to(x.dtype) * torch.arange(16, dtype=x.dtype) / 100
        hidden = self.x_embedder(x) + self.t_embedder(torch.sin(angles))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.final_layer(hidden)


def export_dit(path: Path, *, opset: int = 18, dtype: torch.dtype = torch.float32) -> Path:
    """A TinyDiT as torch.onnx's dynamo exporter writes it, batch size dynamic."""
    torch.manual_seed(0)
    model = TinyDiT().eval().to(dtype)
    arguments = (torch.randn(2, TOKENS, 8, dtype=dtype), torch.tensor([3, 900]))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: batch}, {0: batch}))
    exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert exported is not None
    exported.save(path)
    return path


class PlainPixArt(nn.Module):
    """diffusers' PixArt as anyone would wrap it to export it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = PixArtTransformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=3,
            out_channels=6,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=32,
            cross_attention_dim=WIDTH,
            caption_channels=20,
            use_additional_conditions=False,
        )

    def forward(
        self, latents: torch.Tensor, prompt: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        conditions = {"resolution": None, "aspect_ratio": None}
        (noise,) = self.transformer(
            latents,
            encoder_hidden_states=prompt,
            timestep=timestep,
            encoder_attention_mask=mask,
            added_cond_kwargs=conditions,
            return_dict=False,
        )
        return noise


def export_pixart(path: Path) -> Path:
    """A tiny PixArt as torch.onnx writes it, a Squeeze of a wide dimension included."""
    torch.manual_seed(0)
    arguments = (torch.randn(2, 3, 4, 4), torch.randn(2, TOKENS, 20), torch.tensor([3, 700]), torch.ones(2, TOKENS))
    program = torch.export.export(PlainPixArt().eval(), arguments, strict=False)
    exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    assert exported is not None
    exported.save(path)
    return path
