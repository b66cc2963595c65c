"""CLIP's blocks: the numbers and gradients of the library's own."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from hbi.model.backbones.block import ClassTokenBlock, as_blocks


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("of_class_token", [False, True])
def test_a_block_runs_as_the_librarys(activation: str, of_class_token: bool) -> None:
    torch.manual_seed(0)
    attention: Any = {"attn_implementation": "sdpa"}
    config = CLIPTextConfig(hidden_size=24, intermediate_size=56, num_attention_heads=3, **attention)
    config.hidden_act = activation
    theirs = CLIPEncoderLayer(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = as_blocks(nn.ModuleList([copy.deepcopy(theirs)]))[0]
    mask = None if of_class_token else torch.rand(4, 1, 7, 7) < 0.5 + torch.eye(7)
    if of_class_token:
        ours.__class__ = ClassTokenBlock
    hidden, told = torch.randn(4, 7, 24), torch.randn(4, 1 if of_class_token else 7, 24)
    answers = []
    for layer in (theirs, ours):
        found = layer(hidden, mask)[:, : told.shape[1]]
        answers.append([found, *torch.autograd.grad((found * told).sum(), list(layer.parameters()))])
    for mine, theirs_ in zip(*reversed(answers), strict=True):
        torch.testing.assert_close(mine, theirs_, rtol=1e-4, atol=1e-5)
