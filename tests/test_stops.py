"""`generation_config.json`: read before it is needed, and refused where it is malformed."""

from __future__ import annotations

import json

import pytest

from mmqwen.stops import GENERATION_FILE, read_generation_config


@pytest.mark.parametrize(
    "fields", [{}, {"eos_token_id": 3}, {"eos_token_id": [3, 0]}, {"eos_token_id": None, "a": 1}]
)
def test_what_is_well_formed_is_read(tmp_path, fields):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / GENERATION_FILE).write_text(json.dumps(fields))
    assert read_generation_config(tmp_path) == fields


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b'{"eos_token_id": ', "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[3]", "got a list, expected an object"),
        (b'{"eos_token_id": "<|im_end|>"}', "eos_token_id is '<|im_end|>', expected a token id"),
        (b'{"eos_token_id": [3, [4]]}', "expected a token id, a list of them or null"),
        (b'{"eos_token_id": 3.0}', "eos_token_id is 3.0"),
        (b'{"eos_token_id": true}', "eos_token_id is True"),
        (b'{"eos_token_id": -1}', "eos_token_id is -1"),
        (b'{"eos_token_id": {"a": 1}}', "expected a token id"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, content, words):
    (tmp_path / GENERATION_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="generation_config") as error:
        read_generation_config(tmp_path)
    assert words in str(error.value)
    assert "remove it" in str(error.value)
