"""Prompt files: what loads, and what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import InputError
from exporter.models.inputs import Condition
from exporter.models.prompts import load_prompts

WIDTH = 8
PIXART = (
    Condition("encoder_hidden_states", "prompt_embeds", (None, WIDTH)),
    Condition("encoder_attention_mask", "prompt_attention_mask", (None,), "mask", of="prompt_embeds"),
)


def test_prompts_load_in_float32(tmp_path: Path, prompt_tensors: dict[str, Tensor]) -> None:
    halves = {**prompt_tensors, "prompt_embeds": prompt_tensors["prompt_embeds"].half()}
    halves["prompt_attention_mask"] = prompt_tensors["prompt_attention_mask"].to(torch.int64)
    save_file(halves, tmp_path / "p.safetensors")
    prompts = load_prompts(tmp_path / "p.safetensors", PIXART)
    assert (prompts.count, prompts.negatives) == (3, 1)
    assert {tensor.dtype for tensor in prompts.positive.values()} == {torch.float32}
    assert torch.equal(prompts.positive["encoder_hidden_states"], halves["prompt_embeds"].float())
    assert torch.equal(prompts.positive["encoder_attention_mask"], prompt_tensors["prompt_attention_mask"])
    assert prompts.labels is not None
    assert prompts.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("own_negatives", [False, True])
def test_negatives_are_shared_or_one_each(
    tmp_path: Path, prompt_tensors: dict[str, Tensor], own_negatives: bool
) -> None:
    if own_negatives:
        prompt_tensors["negative_prompt_embeds"] = torch.arange(3.0)[:, None, None].repeat(1, 5, WIDTH)
        prompt_tensors["negative_prompt_attention_mask"] = torch.ones(3, 5)
    save_file(prompt_tensors, tmp_path / "p.safetensors")
    prompts = load_prompts(tmp_path / "p.safetensors", PIXART)
    rows = torch.tensor([2, 0])
    assert prompts.negatives == (3 if own_negatives else 1)
    without = prompts.gather(-1 - rows if own_negatives else torch.full_like(rows, -1))
    expected = prompt_tensors["negative_prompt_embeds"][rows if own_negatives else torch.zeros_like(rows)]
    assert torch.equal(without["encoder_hidden_states"], expected)
    assert without["encoder_attention_mask"].shape == (2, 5)
    given = prompts.gather(rows)
    assert torch.equal(given["encoder_hidden_states"], prompt_tensors["prompt_embeds"][rows])
    assert torch.equal(given["encoder_attention_mask"], prompt_tensors["prompt_attention_mask"][rows])


def test_labels_are_optional(tmp_path: Path, prompt_tensors: dict[str, Tensor]) -> None:
    del prompt_tensors["labels"]
    save_file(prompt_tensors, tmp_path / "p.safetensors")
    assert load_prompts(tmp_path / "p.safetensors", PIXART).labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("negative_prompt_embeds"), "negative_prompt_embeds is missing; the file holds"),
        (lambda t: t.update(prompt_embeds=torch.ones(3, 5, 9)), "9 wide, but the model takes captions 8 wide"),
        (lambda t: t.update(prompt_embeds=torch.ones(5, 8)), r"prompt_embeds is float32 \[5, 8\]; expected floats"),
        (lambda t: t.update(prompt_embeds=torch.ones(0, 5, 8)), r"prompt_embeds is float32 \[0, 5, 8\]"),
        (lambda t: t.update(prompt_embeds=torch.ones(3, 5, 8, dtype=torch.int64)), r"prompt_embeds is int64"),
        (lambda t: t["prompt_embeds"].view(-1)[:2].fill_(float("nan")), "prompt_embeds holds 2 NaN and 0 Inf"),
        (lambda t: t["negative_prompt_embeds"].view(-1)[:1].fill_(float("inf")), "holds 0 NaN and 1 Inf"),
        (lambda t: t.update(negative_prompt_embeds=torch.ones(2, 5, 8)), r"must be \[1 or 3, 5, 8\]"),
        (lambda t: t.update(negative_prompt_embeds=torch.ones(1, 4, 8)), r"must be \[1 or 3, 5, 8\]"),
        (lambda t: t.update(prompt_attention_mask=torch.ones(3, 4)), r"its embeddings ask for \[3, 5\]"),
        (lambda t: t.update(negative_prompt_attention_mask=torch.ones(3, 5)), r"its embeddings ask for \[1, 5\]"),
        (lambda t: t["prompt_attention_mask"][1].fill_(0.5), "prompt_attention_mask holds 0.5; a mask is 1"),
        (lambda t: t["prompt_attention_mask"][1].fill_(float("nan")), "prompt_attention_mask holds nan"),
        (lambda t: t["prompt_attention_mask"][1].fill_(0), "masks out every token of prompt 1"),
        (
            lambda t: t.update(labels=torch.zeros(4, dtype=torch.int64)),
            r"labels is int64 \[4\]; expected integers \[3\]",
        ),
        (lambda t: t.update(labels=torch.zeros(3)), r"labels is float32 \[3\]"),
        (lambda t: t["labels"].fill_(-1), "labels holds -1"),
    ],
)
def test_wrong_prompts_are_named(
    tmp_path: Path,
    prompt_tensors: dict[str, Tensor],
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    change(prompt_tensors)
    save_file(prompt_tensors, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(tmp_path / "p.safetensors", PIXART)
    assert str(tmp_path / "p.safetensors") in str(caught.value)


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; calibration\.prompts is a safetensors file with"):
        load_prompts(tmp_path / "absent.safetensors", PIXART)
    (tmp_path / "p.pt").write_bytes(b"PK\x03\x04" + b"x" * 20)
    with pytest.raises(InputError, match="is a pickle"):
        load_prompts(tmp_path / "p.pt", PIXART)
    (tmp_path / "p.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(InputError, match="damaged or incomplete safetensors"):
        load_prompts(tmp_path / "p.safetensors", PIXART)
