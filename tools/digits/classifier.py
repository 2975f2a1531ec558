"""The small digit classifier that judges the samples: training, ONNX file, recognition."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from rich.progress import Progress
from torch import nn

from digits.dataset import DIGITS, IMAGE_SIDE, DigitImages

CHANNELS = 24
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.05
NOISE = 0.25
SHIFTED_SHARE = 0.3
OPSET = 17
IR_VERSION = 8


def make_network() -> nn.Sequential:
    """Return the untrained network: two 3x3 convolutions, 2x2 maximum, one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(CHANNELS * (IMAGE_SIDE // 2) ** 2, DIGITS),
    )


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images with noise of a random strength, some of them moved by one pixel."""
    count = len(images)
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    windows = padded.unfold(2, IMAGE_SIDE, 1).unfold(3, IMAGE_SIDE, 1)
    offsets = torch.randint(3, (2, count), generator=generator)
    moved = torch.rand(count, generator=generator) < SHIFTED_SHARE
    down, right = torch.where(moved, offsets, 1)
    shifted = windows[torch.arange(count), 0, down, right].unsqueeze(1)
    strength = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return shifted + strength * torch.randn(images.shape, generator=generator)


def train_classifier(training: DigitImages, epochs: int, seed: int, progress: Progress) -> nn.Sequential:
    """Train the network on augmented real digits and return it in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = make_network().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    task = progress.add_task("classifier", total=epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(training), generator=generator).split(BATCH):
            logits = network(augmented(training.images[rows], generator))
            loss = nn.functional.cross_entropy(logits, training.labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        cosine.step()
        progress.advance(task)
    return network.eval()


def classifier_onnx(network: nn.Sequential) -> onnx.ModelProto:
    """Return the network as ONNX: `samples` f32[batch, 1, 8, 8] in [-1, 1] -> `logits` f32[batch, 10].

    Written node by node: seven layers need no exporter, and the file is the same on every machine.
    """
    helper = onnx.helper
    weights = [
        onnx.numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in network.state_dict().items()
    ]
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["samples", "0.weight", "0.bias"], ["first"], **same),
        helper.make_node("Relu", ["first"], ["first_active"]),
        helper.make_node("Conv", ["first_active", "2.weight", "2.bias"], ["second"], **same),
        helper.make_node("Relu", ["second"], ["second_active"]),
        helper.make_node("MaxPool", ["second_active"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "6.weight", "6.bias"], ["logits"], transB=1),
    ]
    floats = onnx.TensorProto.FLOAT
    samples = helper.make_tensor_value_info("samples", floats, ["batch", 1, IMAGE_SIDE, IMAGE_SIDE])
    logits = helper.make_tensor_value_info("logits", floats, ["batch", DIGITS])
    graph = helper.make_graph(nodes, "digits_classifier", [samples], [logits], initializer=weights)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="train_digits")
    onnx.checker.check_model(model, full_check=True)
    return model


def recognised_share(classifier: Path, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images f32[N, 1, 8, 8] that the ONNX classifier takes for their label i64[N]."""
    session = ort.InferenceSession(classifier, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"samples": images.numpy()})
    return float(np.mean(np.argmax(logits, axis=1) == labels.numpy()))
