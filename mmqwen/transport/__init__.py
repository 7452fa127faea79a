"""Validation of embedding rows, and their wire format: bytes <-> rows.

Every door hands rows to this package before anything else sees them. What leaves it is dense,
finite, contiguous, of the right width and in the model's dtype; everything else is refused with an
`EmbeddingError` that says which item, what was got, what was expected and what to do.

torch is imported on first use, so that a client can encode numpy rows without it.
"""

from mmqwen.transport.errors import EmbeddingError
from mmqwen.transport.rows import (
    as_items,
    at_index,
    check_item,
    check_items,
    concat_items,
    convert_rows,
    join_items,
    refuse_non_finite,
    refuse_unknown,
)
from mmqwen.transport.wire import DEFAULT_MAX_BYTES, WIRE_DTYPES, decode_rows, encode_rows

__all__ = [
    "DEFAULT_MAX_BYTES",
    "WIRE_DTYPES",
    "EmbeddingError",
    "as_items",
    "at_index",
    "check_item",
    "check_items",
    "concat_items",
    "convert_rows",
    "decode_rows",
    "encode_rows",
    "join_items",
    "refuse_non_finite",
    "refuse_unknown",
]
