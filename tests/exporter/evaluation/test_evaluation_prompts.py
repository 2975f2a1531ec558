"""Prompt lists in the benchmarks' forms, and which prompts with which seeds a preset draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.evaluation.presets import OWN_SETUP, PRESETS, get_preset
from exporter.evaluation.prompts import Prompt, read_prompts, select


def test_every_form_of_a_list(tmp_path: Path) -> None:
    forms = {
        "p.txt": "a cat\n\n  a dog \n",
        "coco.json": json.dumps({"annotations": [{"id": 7, "caption": "a cat"}, {"id": 3, "caption": "a dog"}]}),
        "mjhq.json": json.dumps({"f0": {"prompt": "a cat", "category": "x"}, "b1": {"prompt": "a dog"}}),
        "sdci.yaml": "sa_1: a cat\nsa_2: a dog\n",
    }
    names = {
        "p.txt": ["00000", "00001"],
        "coco.json": ["00000", "00001"],
        "mjhq.json": ["f0", "b1"],
        "sdci.yaml": ["sa_1", "sa_2"],
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        prompts = read_prompts(tmp_path / name)
        assert [(prompt.name, prompt.row, prompt.text) for prompt in prompts] == [
            (names[name][0], 0, "a cat"),
            (names[name][1], 1, "a dog"),
        ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", "unknown suffix '.csv'"),
        ("p.txt", "\n", "holds no prompts"),
        ("p.json", "{", "not valid JSON"),
        ("p.yaml", "a: [", "not valid YAML"),
        ("p.yaml", "a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("p.json", "1", "expected a list of prompts"),
        ("p.json", "[1]", "entry '00000' has no prompt text"),
        ("p.json", '["a cat", " "]', "entry '00001' has no prompt text"),
        ("p.json", '{"a": {"category": "x"}}', "entry 'a' has no prompt text"),
        ("p.json", '{"annotations": [3]}', "entry '00000' has no prompt text"),
        ("p.json", '{"../../x": "a cat"}', "cannot name an image's file"),
        ("p.json", '{"/x": "a cat"}', "cannot name an image's file"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "missing.txt")


def test_shuffled_selection_is_pythons_own() -> None:
    """What `random.Random(0).shuffle` has done with ten names since Python 3.2."""
    prompts = [Prompt(name, row) for row, name in enumerate("abcdefghij")]
    assert "".join(prompt.name for prompt in select(prompts, 3, "shuffled")) == "bhi"
    assert [prompt.row for prompt in select(prompts, 3, "first")] == [0, 1, 2]
    assert len(select(prompts, None, "first")) == 10


def test_seeds_depend_on_nothing_but_the_prompt() -> None:
    prompt = Prompt("ab", 5)
    assert PRESETS["fp4dit"].seed_of(prompt) == 42
    assert PRESETS["deepcompressor"].seed_of(prompt) == 97 * 31 + 98
    assert PRESETS["deepcompressor"].seed_of(Prompt("f" * 40, 0)) < 1_000_000_007
    assert OWN_SETUP.seed_of(prompt) == 5


def test_presets_check_their_list() -> None:
    with pytest.raises(InputError, match=r"holds 10 prompts, but preset fp4dit draws from captions_val2017.json"):
        PRESETS["fp4dit"].check("p.json", 10)
    PRESETS["fp4dit"].check("p.json", 25_014)
    with pytest.raises(InputError, match="preset deepcompressor-sdci draws 5000"):
        PRESETS["deepcompressor-sdci"].check("p.yaml", 4999)
    with pytest.raises(InputError, match="unknown preset 'deepcompresor'; did you mean 'deepcompressor'"):
        get_preset("deepcompresor")
    assert get_preset(None) is OWN_SETUP


def test_presets_say_where_they_are_from() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert "arXiv" in preset.source
        assert (preset.steps, preset.guidance) == (20, 4.5)
    rows = {row.label: row.values for row in PRESETS["deepcompressor"].published}
    assert rows["NVFP4 SVDQuant + GPTQ"] == {"fid": 16.6, "image_reward": 0.940, "lpips": 0.271, "psnr": 18.5}
