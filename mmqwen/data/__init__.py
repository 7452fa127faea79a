"""Training data: text in JSON lines, rows in safetensors, no pickle; larger than memory.

A dataset is a directory:

    data.jsonl                one sample a line (or data.parquet, one a row)
    rows-m1.safetensors       tensor `rows` [R, d]: the rows of all items of modality m1
    items-m1.safetensors      tensor `offsets` int64 [I + 1]: item i is
                              rows[offsets[i] : offsets[i + 1]]

A line is `{"prompt": "... <|m1|> ...", "answer": "...", "items": {"m1": [0, 1]}}` or
`{"messages": [{"role": ..., "content": ...}, ...], "items": {...}}`; `items` gives, for each
modality, the numbers of its items in the order of the markers. See docs/training.md.
"""

from __future__ import annotations

from mmqwen.data.convert import from_npy_folder
from mmqwen.data.dataset import Example, RowsDataset
from mmqwen.data.encoding import Encoding, encode
from mmqwen.data.errors import DatasetError
from mmqwen.data.format import RowStore, Sample
from mmqwen.data.validation import DatasetSummary, measure, validate
from mmqwen.data.writer import DatasetWriter

__all__ = [
    "DatasetError",
    "DatasetSummary",
    "DatasetWriter",
    "Encoding",
    "Example",
    "RowStore",
    "RowsDataset",
    "Sample",
    "encode",
    "from_npy_folder",
    "measure",
    "validate",
]
