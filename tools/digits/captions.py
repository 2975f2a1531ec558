"""Caption embeddings that stand in for a text encoder: fixed random tokens, one caption per digit."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from digits.dataset import DIGITS

CAPTION_TOKENS = 6
CAPTION_CHANNELS = 64
FEWEST_REAL_TOKENS = 2
NEGATIVE_REAL_TOKENS = 1


@dataclass(frozen=True)
class Captions:
    """Ten captions, the n-th for digit n, and the negative caption of classifier-free guidance.

    `prompt_embeds` f32[10, S, D], `prompt_attention_mask` i64[10, S] (1 keeps a token, 0 drops it),
    `negative_prompt_embeds` f32[1, S, D], `negative_prompt_attention_mask` i64[1, S], `labels` i64[10].
    """

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    negative_prompt_attention_mask: torch.Tensor
    labels: torch.Tensor

    def rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (embeddings, masks) of the given rows; row 10 is the negative caption."""
        embeds = torch.cat([self.prompt_embeds, self.negative_prompt_embeds])
        masks = torch.cat([self.prompt_attention_mask, self.negative_prompt_attention_mask])
        return embeds[rows], masks[rows]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that they have in the prompts file."""
        return dict(vars(self))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Captions":
        """Build the captions from a prompts file's tensors."""
        return cls(**tensors)


NEGATIVE_ROW = DIGITS


def make_captions(seed: int) -> Captions:
    """Draw the captions: digit n has 2 to 6 real tokens, then one padding token repeated.

    The padding token is as large as the others, as a text encoder's is: whoever ignores the mask
    changes the result.
    """
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(DIGITS + 1, CAPTION_TOKENS, CAPTION_CHANNELS, generator=generator)
    padding = torch.randn(CAPTION_CHANNELS, generator=generator)
    choices = CAPTION_TOKENS - FEWEST_REAL_TOKENS + 1
    lengths = torch.tensor([FEWEST_REAL_TOKENS + digit % choices for digit in range(DIGITS)] + [NEGATIVE_REAL_TOKENS])
    real = torch.arange(CAPTION_TOKENS) < lengths[:, None]
    embeds = torch.where(real[..., None], embeds, padding)
    masks = real.to(torch.int64)
    return Captions(embeds[:DIGITS], masks[:DIGITS], embeds[DIGITS:], masks[DIGITS:], torch.arange(DIGITS))
