"""Validation of rows and the wire format: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import base64
import gc
import json
import pickle
import string
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmqwen.modalities import ModalitySpec
from mmqwen.transport import (
    EmbeddingError,
    check_item,
    check_items,
    concat_items,
    decode_rows,
    encode_rows,
    wire,
)

try:
    import ml_dtypes
except ImportError:  # optional: numpy's bfloat16
    ml_dtypes = None

needs_ml_dtypes = pytest.mark.skipif(
    ml_dtypes is None,
    reason="needs the package ml_dtypes, whose bfloat16 numpy then knows (pip install ml_dtypes)",
)

DIM = 6
SPEC = ModalitySpec("m1", DIM, max_rows=5)
SPECS = {"m1": SPEC, "m2": ModalitySpec("m2", 3)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

floats = st.floats(-100, 100, width=16)
rows_strategy = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(floats, min_size=DIM, max_size=DIM), min_size=n, max_size=n)
)


@pytest.fixture(params=["pybase64", "standard library"])
def base64_backend(request, monkeypatch):
    if request.param == "standard library":
        monkeypatch.setattr(wire, "pybase64", None)
    elif wire.pybase64 is None:
        pytest.skip(
            "needs the package pybase64, which vLLM brings (pip install pybase64); what serves "
            "without it is tested by the other half, 'standard library'"
        )


def refusal(call, *args, **kwargs) -> EmbeddingError:
    with pytest.raises(EmbeddingError) as caught:
        call(*args, **kwargs)
    return caught.value


def item_with(shape=(2, DIM), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def quiet(make, *args):
    """The result of a torch or numpy function that warns of being experimental or old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


# -- what is taken -----------------------------------------------------------------------------

BASE = item_with()
ACCEPTED = {
    "fp32": BASE,
    "fp64": BASE.double(),
    "transposed": BASE.t().contiguous().t(),
    "strided": torch.stack([BASE, BASE], dim=-1)[..., 0],
    "expanded": BASE[:1].expand(2, DIM),
    "requires grad": BASE.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(BASE.clone()),
    "imaginary part, negated lazily": torch.complex(BASE, BASE).conj().imag,
    "numpy": BASE.numpy(),
    "numpy fp64": BASE.double().numpy(),
    "numpy fortran order": np.asfortranarray(BASE.numpy()),
    "numpy negative strides": BASE.numpy()[::-1, ::-1],
    "numpy big-endian": BASE.numpy().astype(">f4"),
    "numpy matrix": quiet(np.matrix, BASE.numpy()),
    "lists": BASE.tolist(),
    "tuples": tuple(map(tuple, BASE.tolist())),
    "lists of numpy scalars": [list(row) for row in BASE.numpy()],
}


def test_a_single_row_of_a_reversed_array_is_taken():
    """numpy calls it contiguous, and torch does not take its stride."""
    got = check_item(BASE.numpy()[:1][::-1], SPEC, index=0, dtype=torch.float32)
    assert torch.equal(got, BASE[:1])


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_item_takes_every_dense_float(name, dtype):
    value = ACCEPTED[name]
    if isinstance(value, torch.Tensor):
        expected = value.detach().clone()
    else:
        expected = torch.tensor(np.array(value, dtype=np.float64)).float()
    got = check_item(value, SPEC, index=0, dtype=dtype)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert got.shape == (2, DIM)
    assert not got.requires_grad
    assert not got.is_neg()
    assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("kind", ["float16", pytest.param("bfloat16", marks=needs_ml_dtypes)])
def test_check_item_takes_half_width_numpy_exactly(kind):
    array = BASE.numpy().astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16)
    got = check_item(array, SPEC, index=0, dtype=torch.float32)
    assert np.array_equal(got.numpy(), array.astype(np.float32))


def test_read_only_numpy_neither_warns_nor_is_shared():
    array = BASE.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = check_item(array, SPEC, index=0, dtype=torch.float32)
    got.zero_()
    assert array.any()


def test_whole_numbers_in_lists_are_floats():
    got = check_item([1, 0, 0.5, 2, 0, 0], SPEC, index=0, dtype=torch.float32)
    assert got.tolist() == [[1, 0, 0.5, 2, 0, 0]]


def test_large_finite_values_whose_sum_overflows_are_taken():
    top = torch.finfo(torch.float16).max
    assert check_item(torch.full((5, DIM), top), SPEC, index=0, dtype=torch.float16).max() == top
    top = torch.finfo(torch.float32).max
    assert check_item(torch.full((5, DIM), top), SPEC, index=0, dtype=torch.float32).max() == top


@given(
    st.lists(
        st.tuples(rows_strategy, st.sampled_from(["torch", "bf16", "numpy", "half", "list", "1d"])),
        max_size=7,
    ),
    st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_concat_items_equals_item_by_item(drawn, dtype):
    make = {
        "torch": torch.tensor,
        "bf16": lambda rows: torch.tensor(rows).bfloat16(),
        "numpy": lambda rows: np.array(rows, np.float64),
        "half": lambda rows: np.array(rows, np.float16),
        "list": lambda rows: rows,
        "1d": lambda rows: torch.tensor(rows[0]),
    }
    items = [make[kind](rows) for rows, kind in drawn]
    joined, counts = concat_items(items, SPEC, dtype)
    single = [check_item(item, SPEC, index=i, dtype=dtype) for i, item in enumerate(items)]
    assert counts == [len(rows) for rows in single]
    assert joined.shape == (sum(counts), DIM)
    assert joined.is_contiguous()
    assert torch.equal(joined, torch.cat([torch.empty(0, DIM, dtype=dtype), *single]))


def test_check_items_reads_lists_and_bare_arrays():
    got = check_items(
        {"m2": np.ones(3), "m1": [BASE, BASE[0], BASE.tolist()]}, SPECS, dtype=torch.bfloat16
    )
    assert list(got) == ["m2", "m1"]
    assert [tuple(rows.shape) for rows in got["m1"]] == [(2, DIM), (1, DIM), (2, DIM)]
    assert torch.equal(got["m2"][0], torch.ones(1, 3, dtype=torch.bfloat16))
    assert len(check_items({"m1": BASE}, SPECS, dtype=torch.float32)["m1"]) == 1
    assert check_items({"m1": []}, SPECS, dtype=torch.float32) == {"m1": []}


# -- what is refused ---------------------------------------------------------------------------

NESTED = quiet(torch.nested.nested_tensor, [torch.zeros(1, DIM), torch.zeros(2, DIM)])
QUANTIZED = quiet(torch.quantize_per_tensor, torch.zeros(DIM), 1.0, 0, torch.quint8)
REFUSED = {
    "wrong width": (torch.zeros(2, DIM + 1), "width"),
    "wrong width, 1-D": (np.zeros(DIM - 1), "width"),
    "wrong width, list": ([[0.0] * (DIM + 1)], "width"),
    "no rows": (torch.zeros(0, DIM), "rows"),
    "too many rows": (np.zeros((6, DIM)), "rows"),
    "too many rows, list": ([[0.0] * DIM] * 6, "rows"),
    "0-D": (torch.tensor(1.0), "dims"),
    "3-D": (torch.zeros(1, 2, DIM), "dims"),
    "3-D list": ([[[0.0] * DIM] * DIM], "dims"),
    "empty list": ([], "width"),
    "ragged": ([[0.0] * DIM, [0.0] * (DIM - 1)], "ragged"),
    "half a matrix": ([[0.0] * DIM, 1.0], "ragged"),
    "int tensor": (torch.zeros(DIM, dtype=torch.int64), "dtype"),
    "bool tensor": (torch.zeros(DIM, dtype=torch.bool), "dtype"),
    "complex tensor": (torch.zeros(DIM, dtype=torch.complex64), "dtype"),
    "fp8 tensor": (torch.zeros(DIM).to(torch.float8_e4m3fn), "dtype"),
    "int array": (np.zeros(DIM, np.int32), "dtype"),
    "bool array": (np.zeros(DIM, bool), "dtype"),
    "complex array": (np.zeros(DIM, complex), "dtype"),
    "long double": (np.zeros(DIM, np.longdouble), "dtype"),
    "object array": (np.array([0.0] * DIM, dtype=object), "dtype"),
    "structured array": (np.zeros(DIM, dtype=[("x", "f4")]), "dtype"),
    "text array": (np.array(["1"] * DIM), "dtype"),
    "masked array": (np.ma.masked_array(np.zeros(DIM), mask=[1] + [0] * (DIM - 1)), "dtype"),
    "quantized": (QUANTIZED, "dtype"),
    "sparse coo": (torch.zeros(2, DIM).to_sparse(), "sparse"),
    "sparse csr": (quiet(torch.zeros(2, DIM).to_sparse_csr), "sparse"),
    "nested": (NESTED, "sparse"),
    "meta": (torch.zeros(2, DIM, device="meta"), "type"),
    "bool in list": ([True] + [0.0] * (DIM - 1), "type"),
    "text in list": (["1.0"] * DIM, "type"),
    "None in list": ([None] * DIM, "type"),
    "text": ("0" * DIM, "type"),
    "bytes": (b"\0" * 4 * DIM, "type"),
    "None": (None, "type"),
    "dict": ({"data": "x"}, "type"),
    "NaN": (torch.full((DIM,), float("nan")), "non_finite"),
    "Inf": (np.full((2, DIM), np.inf), "non_finite"),
    "Inf and -Inf": (torch.tensor([np.inf, -np.inf] * 3), "non_finite"),
    "NaN in list": ([float("nan")] * DIM, "non_finite"),
    "huge int in list": ([10**400] * DIM, "non_finite"),
    "too large for fp32": ([1e300] * DIM, "non_finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_check_item_refuses(name):
    value, reason = REFUSED[name]
    error = refusal(check_item, value, SPEC, index=3, dtype=torch.bfloat16)
    assert error.reason == reason
    assert error.modality == "m1"
    assert error.index == 3
    for word in ("modality 'm1'", "item 3", "got ", "expected "):
        assert word in str(error)
    assert len(str(error)) < 400


def test_sparse_tensor_is_refused_before_it_is_densified():
    """Right shape, 1.5 KB, and 4 TiB when dense: serving.md, the sparse case."""
    spec = ModalitySpec("m1", 2**20, max_rows=2**20)
    at = torch.zeros(2, 1, dtype=torch.long)
    bomb = quiet(torch.sparse_coo_tensor, at, [1.0], (2**20, 2**20))
    assert refusal(check_item, bomb, spec, index=0, dtype=torch.float32).reason == "sparse"


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e30), (torch.bfloat16, 3.4e38)])
def test_overflow_of_the_conversion_is_refused_and_said(dtype, value):
    rows = torch.zeros(3, DIM)
    rows[2, 1] = value
    assert check_item(rows, SPEC, index=0, dtype=torch.float32) is not None
    error = refusal(check_item, rows, SPEC, index=0, dtype=dtype)
    assert error.reason == "non_finite"
    assert "row 2" in str(error)
    assert f"beyond the range of {dtype}".replace("torch.", "") in str(error)


def test_the_offender_is_named_among_many_items():
    items = [item_with((n, DIM)) for n in (1, 3, 2, 5)]
    items[2][1, 4] = float("nan")
    error = refusal(check_items, {"m1": items}, SPECS, dtype=torch.bfloat16)
    assert error.index == 2
    assert "item 2" in str(error)
    assert "row 1" in str(error)
    items[2] = torch.zeros(DIM + 1)
    assert refusal(concat_items, items, SPEC, torch.float32).index == 2


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda rows: rows.to_sparse(), "sparse"),
        (lambda rows: rows.to_sparse_csr(), "sparse"),
        (lambda rows: torch.nested.nested_tensor([rows]), "sparse"),
        (lambda rows: rows.to("meta"), "type"),
        (lambda rows: rows.int(), "dtype"),
        (lambda rows: rows.to(torch.complex64), "dtype"),
        (lambda rows: rows[None], "dims"),
        (lambda rows: rows[:0], "rows"),
        (lambda rows: rows[:, 1:], "width"),
        (lambda rows: [*rows.tolist(), [1.0]], "ragged"),
        (lambda rows: "rows", "type"),
    ],
)
def test_a_foreign_item_among_items_that_are_alike(make, reason, at):
    """Items that are alike are checked together; what is not like them must not pass with them."""
    items = [item_with() for _ in range(4)]
    items[at] = make(items[at])
    error = refusal(concat_items, items, SPEC, torch.float32)
    assert (error.reason, error.index) == (reason, at)
    assert f"item {at}" in str(error)


def test_items_that_are_alike_share_no_memory_unless_they_are_one():
    items = [item_with(), item_with(), item_with()]
    joined, counts = concat_items(items, SPEC, torch.float32)
    assert counts == [2, 2, 2]
    joined.zero_()
    assert items[0].abs().max() > 0
    leaf = item_with().requires_grad_()
    joined, _ = concat_items([leaf, item_with()], SPEC, torch.float32)
    assert not joined.requires_grad
    negative = torch.complex(item_with(), item_with()).conj().imag
    joined, _ = concat_items([negative], SPEC, torch.float32)
    assert torch.equal(joined, -item_with())


def test_check_items_refuses_what_is_no_dict_of_lists():
    for data, reason in [
        ({"nope": [BASE]}, "unknown_modality"),
        ({7: [BASE]}, "unknown_modality"),
        ({"x" * 10_000: [BASE]}, "unknown_modality"),
        ({"m1": torch.zeros(2, 2, DIM)}, "dims"),
        ({"m1": np.zeros((2, 2, DIM))}, "dims"),
        ({"m1": np.float32(1)}, "type"),
        ({"m1": [0.0] * DIM}, "dims"),
        ({"m1": None}, "type"),
        ({"m1": "abc"}, "type"),
        ([BASE], "type"),
    ]:
        error = refusal(check_items, data, SPECS, dtype=torch.float32)
        assert error.reason == reason
        assert len(str(error)) < 400
    assert "m1" in str(refusal(check_items, {"nope": []}, SPECS, dtype=torch.float32))


def test_error_survives_pickling():
    """vLLM hands exceptions between its processes."""
    error = refusal(check_item, None, SPEC, index=2, dtype=torch.float32)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.modality, copy.index, copy.reason) == (str(error), "m1", 2, "type")


# -- the wire: round trips ---------------------------------------------------------------------


@given(rows_strategy, st.sampled_from(DTYPES), st.sampled_from(["torch", "numpy"]))
@settings(max_examples=150, deadline=None)
def test_round_trip_is_exact(rows, dtype, library):
    tensor = torch.tensor(rows).to(dtype)
    sent = tensor
    if library == "numpy":
        sent = tensor.float().numpy()  # bf16 is rounded on the way out
    payload = json.loads(json.dumps(encode_rows(sent, dtype)))
    assert payload["dtype"] == str(dtype).removeprefix("torch.")
    got = decode_rows(payload, SPEC)
    assert got.dtype is dtype
    assert torch.equal(got, tensor)
    got.add_(1)  # its memory is its own and writable


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_encoding_rounds_as_torch_does(values, dtype):
    expected = torch.tensor(values, dtype=torch.float32).to(dtype)
    array = np.array(values, np.float32)
    if not expected.isfinite().all():
        assert refusal(encode_rows, array, dtype).reason == "non_finite"
        return
    payload = encode_rows(array, dtype)
    raw = bytearray(base64.b64decode(payload["data"]))
    assert torch.equal(torch.frombuffer(raw, dtype=dtype), expected)


def test_bytes_are_little_endian():
    payload = encode_rows(np.array([[1.0, -2.0]], ">f4"))
    assert base64.b64decode(payload["data"]) == np.array([1.0, -2.0], "<f4").tobytes()
    assert payload == encode_rows([1, -2]) == encode_rows(torch.tensor([[1.0, -2.0]]))


@pytest.mark.parametrize("dtype", ["float16", torch.float16, np.float16, np.dtype("float16")])
def test_dtype_may_be_named_in_any_library(dtype):
    assert encode_rows(BASE, dtype) == encode_rows(BASE.half())


@needs_ml_dtypes
def test_numpy_bfloat16_travels_as_it_is():
    array = BASE.numpy().astype(ml_dtypes.bfloat16)
    assert encode_rows(array) == encode_rows(BASE.bfloat16())
    assert encode_rows(BASE, ml_dtypes.bfloat16) == encode_rows(BASE, "bfloat16")


def test_encode_rows_refuses():
    for rows, dtype, reason in [
        (np.zeros((2, 2, 2)), None, "dims"),
        (np.zeros((0, 4)), None, "dims"),
        (np.float32(1.0), None, "type"),
        (torch.tensor(1.0), None, "dims"),
        (np.zeros(3, int), None, "dtype"),
        (torch.zeros(3, dtype=torch.int64), None, "dtype"),
        (torch.zeros(2, 3).to_sparse(), None, "sparse"),
        (np.zeros(3), "float64", "dtype"),
        (np.zeros(3), "int8", "dtype"),
        (np.full(3, 1e6), "float16", "non_finite"),
        (np.full(3, np.nan), "bfloat16", "non_finite"),
        (np.full(3, 1e300), None, "non_finite"),
        ([[1.0], [1.0, 2.0]], None, "ragged"),
        ("abc", None, "type"),
    ]:
        error = refusal(encode_rows, rows, dtype, modality="m1")
        assert error.reason == reason
        assert "'m1'" in str(error)


# -- the wire: hostile payloads ----------------------------------------------------------------

GOOD = encode_rows(BASE)


def changed(**fields):
    return {**GOOD, **fields}


HOSTILE = {
    "not an object": ([GOOD], "type"),
    "text": ("data", "type"),
    "nothing": (None, "type"),
    "empty": ({}, "field"),
    "missing field": ({"data": "", "dtype": "float32"}, "field"),
    "unknown field": (changed(uuid="chosen by the caller"), "field"),
    "field replaced": ({"data": "", "dtype": "float32", "uuid": 1}, "field"),
    "dtype int8": (changed(dtype="int8"), "dtype"),
    "dtype object": (changed(dtype="object"), "dtype"),
    "dtype list": (changed(dtype=["float32"]), "dtype"),
    "dtype long": (changed(dtype="f" * 10**6), "dtype"),
    "shape text": (changed(shape="2,6"), "dims"),
    "shape empty": (changed(shape=[]), "dims"),
    "shape scalar": (changed(shape=12), "dims"),
    "shape 3-D": (changed(shape=[1, 2, DIM]), "dims"),
    "shape endless": (changed(shape=[1] * 10**6), "dims"),
    "shape unprintable": (changed(shape=[10**5000] * 3), "dims"),
    "shape floats": (changed(shape=[2.0, 6.0]), "dims"),
    "shape bool": (changed(shape=[True, DIM]), "dims"),
    "shape nested": (changed(shape=[[2], DIM]), "dims"),
    "rows negative": (changed(shape=[-2, DIM]), "rows"),
    "rows both negative": (changed(shape=[-2, -DIM]), "width"),
    "rows zero": (changed(shape=[0, DIM]), "rows"),
    "rows too many": (changed(shape=[6, DIM]), "rows"),
    "rows astronomical": (changed(shape=[10**5000, DIM]), "rows"),
    "width wrong": (changed(shape=[4, 3]), "width"),
    "width astronomical": (changed(shape=[2, 2**63]), "width"),
    "data list": (changed(data=[0] * 48), "encoding"),
    "data bytes": (changed(data=GOOD["data"].encode()), "encoding"),
    "data null": (changed(data=None), "encoding"),
    "data empty": (changed(data=""), "encoding"),
    "data short": (changed(data=GOOD["data"][:-4]), "encoding"),
    "data long": (changed(data=GOOD["data"] + "AAAA"), "encoding"),
    "data with newline": (changed(data=GOOD["data"][:-1] + "\n"), "encoding"),
    "data URL-safe": (changed(data="-_" + GOOD["data"][2:]), "encoding"),
    "data not ASCII": (changed(data="é" * len(GOOD["data"])), "encoding"),
    "data surrogates": (changed(data="\ud800" * len(GOOD["data"])), "encoding"),
    "data padding within": (changed(data="AA==" + GOOD["data"][4:]), "encoding"),
    "data only padding": (changed(data="=" * len(GOOD["data"])), "encoding"),
    "dtype disagrees": (changed(dtype="float16"), "encoding"),
    "pickle": (changed(data=base64.b64encode(b"\x80\x04" + b"." * 46).decode()[:60]), "encoding"),
    "NaN bits": (changed(data=base64.b64encode(b"\xff" * 48).decode()), "non_finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_decode_rows_refuses(name, base64_backend):
    payload, reason = HOSTILE[name]
    error = refusal(decode_rows, payload, SPEC, index=1)
    assert error.reason == reason
    assert error.modality == "m1"
    assert error.index == 1
    assert "modality 'm1', item 1: got " in str(error)
    assert len(str(error)) < 500


def test_decode_rows_takes_a_vector(base64_backend):
    payload = encode_rows(BASE[0])
    assert torch.equal(decode_rows({**payload, "shape": [DIM]}, SPEC), BASE[:1])
    assert torch.equal(decode_rows(payload, SPEC), BASE[:1])


def test_byte_cap_is_checked_before_the_data():
    payload = {"data": None, "dtype": "float32", "shape": [2, DIM]}
    assert refusal(decode_rows, payload, SPEC, max_bytes=47).reason == "size"
    assert torch.equal(decode_rows(GOOD, SPEC, max_bytes=48), BASE)


def test_nothing_is_allocated_for_a_declared_size():
    spec = ModalitySpec("m1", 2**20, max_rows=2**20)  # 4 TiB, declared in 60 characters
    payload = {"data": "AAAA", "dtype": "float32", "shape": [2**20, 2**20]}
    tracemalloc.start()
    try:
        assert refusal(decode_rows, payload, spec).reason == "size"
        assert refusal(decode_rows, payload, spec, max_bytes=2**60).reason == "encoding"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# -- the wire: fuzz ----------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
near_base64 = st.text(string.ascii_letters + string.digits + "+/=-_ \n\0é", max_size=80)
mutated = st.tuples(st.integers(0, 63), st.characters()).map(
    lambda cut: GOOD["data"][: cut[0]] + cut[1] + GOOD["data"][cut[0] + 1 :]
)
payloads = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {
            "data": st.one_of(
                near_base64,
                mutated,
                st.binary(max_size=64).map(lambda raw: base64.b64encode(raw).decode()),
                json_values,
            ),
            "dtype": st.sampled_from([*wire.WIRE_DTYPES, "float64", "int32"]) | json_values,
            "shape": st.lists(st.integers(-1, 6), max_size=3)
            | st.tuples(st.integers(1, 5), st.just(DIM)).map(list)
            | json_values,
        },
    ),
)


def decode_or_refuse(payload) -> None:
    """Either valid rows, or an EmbeddingError; nothing else may come of a payload."""
    try:
        rows = decode_rows(payload, SPEC, max_bytes=4096)
    except EmbeddingError as caught:
        error = caught
    else:
        assert rows.dim() == 2
        assert rows.shape[1] == DIM
        assert 1 <= len(rows) <= SPEC.max_rows
        assert bool(rows.isfinite().all())
        return
    assert error.modality == "m1"
    assert len(str(error)) < 600


@given(payloads)
@settings(max_examples=400, deadline=None)
def test_decode_rows_fuzz(payload):
    decode_or_refuse(payload)


@pytest.mark.fuzz
def test_decode_rows_long_fuzz_in_flat_memory():
    """At least 20,000 hostile payloads, without memory that grows with their number."""
    cases = 0
    sizes: list[int] = []

    @given(payloads)
    @settings(
        max_examples=3_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def batch(payload):
        nonlocal cases
        cases += 1
        decode_or_refuse(payload)

    rng = np.random.default_rng(0)
    good = json.dumps(GOOD).encode()

    def mutate_bytes(count: int) -> None:
        nonlocal cases
        for _ in range(count):
            text = bytearray(good)
            for at in rng.integers(0, len(text), rng.integers(1, 5)):
                text[at] = rng.integers(32, 127)
            cases += 1
            try:
                payload = json.loads(text)
            except ValueError:
                continue
            decode_or_refuse(payload)

    batch()  # caches of hypothesis and torch fill once
    tracemalloc.start()
    try:
        for _ in range(4):
            mutate_bytes(5_000)
            gc.collect()  # refusals and their frames hold each other
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert cases >= 20_000
    assert sizes[-1] - sizes[0] < 64 * 1024, sizes
