"""The client stays light, and what it builds is what the server decodes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmqwen.client import embeds_part
from mmqwen.modalities import ModalitySpec
from mmqwen.transport import EmbeddingError, decode_rows


def test_client_loads_neither_torch_nor_transformers():
    program = """
import sys
import numpy as np
from mmqwen.client import embeds_part
embeds_part("m1", np.ones((2, 3), np.float32))
embeds_part("m1", np.ones((2, 3)), "bfloat16")
embeds_part("m1", [[1.0, 2.0]])
heavy = {"torch", "transformers", "vllm", "triton", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_part_decodes_to_the_rows(dtype):
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    part = embeds_part("m1", rows, dtype)
    assert set(part) == {"type", "m1_embeds"}
    assert part["type"] == "m1_embeds"
    assert part["m1_embeds"]["shape"] == [3, 8]
    got = decode_rows(part["m1_embeds"], ModalitySpec("m1", 8))
    assert got.dtype is getattr(torch, dtype or "float32")
    assert torch.equal(got, torch.from_numpy(rows).to(got.dtype))


def test_a_bad_part_names_the_modality():
    with pytest.raises(EmbeddingError, match="modality 'm1': got dtype int64") as caught:
        embeds_part("m1", np.zeros(4, np.int64))
    assert caught.value.modality == "m1"
    assert caught.value.reason == "dtype"
