"""What quantizing an ONNX model does or did, as a table and as a few lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from exporter.describe import layer_plan_table, size_text
from exporter.onnx_input.foreign import ForeignModel
from exporter.onnx_input.job import OnnxResult
from exporter.onnx_input.selection import Selection
from exporter.onnx_input.waist import WaistModel
from exporter.targets import TargetChoice


def print_plan(loaded: ForeignModel | WaistModel, choice: TargetChoice, output: str, console: Console) -> None:
    """Print target, every quantized layer, and every other linear layer with the reason."""
    console.print(f"output  {output}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"target  {choice.target.name} ({choice.reason})", markup=False, highlight=False)
    console.print(layer_plan_table(loaded.selection.layers, choice.target))
    if loaded.selection.kept:
        console.print(_kept_table(loaded.selection))


def _kept_table(selection: Selection) -> Table:
    table = Table(title=f"{len(selection.kept)} linear layers in high precision", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("N x K", justify="right", no_wrap=True)
    table.add_column("reason")
    for kept in selection.kept:
        table.add_row(kept.name, f"{kept.out_features} x {kept.in_features}", kept.reason)
    return table


def summary_lines(result: OnnxResult) -> list[str]:
    """How many layers, sizes, SNR and where everything is."""
    layers = result.selection.layers
    formats = sorted({f"{layer.weight_format}/{layer.activation_format}" for layer in layers})
    ratio = result.output_bytes / result.source_bytes
    lines = [
        f"quantized  {len(layers)} linear layers ({', '.join(formats)}, weights/activations)",
        f"kept       {len(result.selection.kept)} linear layers in high precision",
        f"size       {size_text(result.source_bytes)} -> {size_text(result.output_bytes)} ({ratio:.3f})",
    ]
    if result.snr_db is not None:
        lines.append(f"SNR        {result.snr_db:.1f} dB against {result.source.name}, on random inputs")
    return [*lines, f"engine     {result.output}", f"work       {result.work_dir}"]
