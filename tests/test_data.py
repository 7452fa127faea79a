"""The dataset format: what is written is read back, and what is wrong is said with its line."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mmqwen.data import (
    DatasetError,
    DatasetWriter,
    Example,
    RowsDataset,
    Sample,
    encode,
    from_npy_folder,
    validate,
)
from mmqwen.modalities import assign_token_ids, parse_modalities
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.training import Collator
from mmqwen.transport import EmbeddingError
from tiny import make_tokenizer

SPECS = parse_modalities({"m1": {"dim": 4, "max_rows": 3}, "m2": 6})


@pytest.fixture(scope="module")
def tokenizer_and_specs():
    tokenizer = make_tokenizer()
    specs = assign_token_ids(SPECS, tokenizer.get_added_vocab(), len(tokenizer))
    add_placeholder_tokens(tokenizer, specs)
    return tokenizer, specs


def write_small(path: Path) -> Path:
    with DatasetWriter(path, SPECS) as writer:
        shared = writer.add_item("m1", torch.arange(8.0).view(2, 4))
        writer.add("Describe <|m1|> and <|m1|>", " one", {"m1": [shared, np.ones(4, np.float32)]})
        writer.add_messages(
            [{"role": "user", "content": "What <|m2|>?"}, {"role": "assistant", "content": "two"}],
            {"m2": [[[0.5] * 6]]},
        )
        writer.add("No rows", " three")
        writer.add("", " four", {"m1": [shared]})
    return path


def rewrite_line(path: Path, number: int, **fields) -> None:
    file = path / "data.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[number - 1].update(fields)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -- writing and reading -----------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    dataset = RowsDataset(write_small(tmp_path / "data"))
    assert len(dataset) == 4
    first = dataset[0]
    assert first.sample.prompt == "Describe <|m1|> and <|m1|>"
    assert first.counts == {"m1": [2, 1]}
    assert torch.equal(first.rows["m1"][0], torch.arange(8.0).view(2, 4))
    assert torch.equal(first.rows["m1"][1], torch.ones(1, 4))
    assert dataset[1].sample.messages[1]["content"] == "two"
    assert torch.equal(dataset[-1].rows["m1"][0], first.rows["m1"][0])
    assert dataset.store("m1").num_items == 2  # the shared item is stored once
    assert first.where.endswith("data.jsonl:1")
    with pytest.raises(IndexError):
        dataset[4]


def test_the_files_are_what_the_page_says(tmp_path):
    path = write_small(tmp_path / "data")
    assert sorted(p.name for p in path.iterdir()) == [
        "data.jsonl",
        "items-m1.safetensors",
        "items-m2.safetensors",
        "rows-m1.safetensors",
        "rows-m2.safetensors",
    ]
    assert load_file(path / "rows-m1.safetensors")["rows"].shape == (3, 4)
    assert load_file(path / "items-m1.safetensors")["offsets"].tolist() == [0, 2, 3]
    assert json.loads((path / "data.jsonl").read_text().splitlines()[0])["items"] == {"m1": [0, 1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    with DatasetWriter(tmp_path / "data", {"m1": 3}, dtype=dtype) as writer:
        writer.add("<|m1|>", "x", {"m1": [torch.tensor([[1.0, -2.5, 0.25]])]})
    (item,) = RowsDataset(tmp_path / "data")[0].rows["m1"]
    assert item.dtype == dtype
    assert item.tolist() == [[1.0, -2.5, 0.25]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=6))
def test_any_raggedness_comes_back(tmp_path_factory, shape):
    path = tmp_path_factory.mktemp("ragged") / "data"
    wanted = [[torch.randn(n, 4) for n in sample] for sample in shape]
    with DatasetWriter(path, SPECS) as writer:
        for items in wanted:
            writer.add("text", "answer", {"m1": items})
    dataset = RowsDataset(path)
    for example, items in zip(dataset, wanted, strict=True):
        got = example.rows.get("m1", [])
        assert len(got) == len(items)
        assert all(torch.equal(a, b) for a, b in zip(got, items, strict=True))
    assert validate(path, SPECS).samples == len(shape)


def test_rows_without_an_index_are_items_of_one_row(tmp_path):
    save_file({"rows": torch.arange(12.0).view(3, 4)}, tmp_path / "rows-m1.safetensors")
    line = {"prompt": "<|m1|>", "answer": "x", "items": {"m1": [2]}}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))  # no newline at the end
    dataset = RowsDataset(tmp_path / "data.jsonl")
    assert dataset[0].rows["m1"][0].tolist() == [[8.0, 9.0, 10.0, 11.0]]
    validate(tmp_path, SPECS)


def test_a_dataset_travels_to_workers(tmp_path):
    dataset = RowsDataset(write_small(tmp_path / "data"))
    dataset[0]  # opens a file
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0].rows["m1"][0], dataset[0].rows["m1"][0])


def test_rows_are_not_read_until_asked_for(tmp_path):
    """A file of 4 GB (sparse) opens and gives its last row at once."""
    path = write_small(tmp_path / "data")
    rows = 2**28  # of 4 elements
    size = rows * 16
    entry = {"rows": {"dtype": "F32", "shape": [rows, 4], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode().ljust(504)
    with open(path / "rows-m1.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(512 + size)
    save_file({"offsets": torch.tensor([0, rows - 1, rows])}, path / "items-m1.safetensors")
    store = RowsDataset(path).store("m1")
    assert store.item(1).tolist() == [[0.0] * 4]


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    def fail():
        with DatasetWriter(tmp_path / "data", SPECS) as writer:
            writer.add("<|m1|>", "x", {"m1": [torch.ones(4)]})
            writer.add("<|m1|>", "x", {"m1": [torch.ones(5)]})

    with pytest.raises(EmbeddingError, match="width 5, expected width 4"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    from mmqwen.data import writer as module

    def full(self, rows):
        raise OSError(28, "No space left on device")

    def fail():
        with DatasetWriter(tmp_path / "data", SPECS) as writer:
            monkeypatch.setattr(module._TensorStream, "write", full)
            writer.add("<|m1|>", "x", {"m1": [torch.ones(4)]})

    with pytest.raises(DatasetError, match="No space left"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_cannot_be_learnt(tmp_path):
    with DatasetWriter(tmp_path / "data", SPECS) as writer:
        row = torch.ones(4)
        with pytest.raises(DatasetError, match="sample 1: an answer is empty"):
            writer.add("<|m1|>", " ", {"m1": [row]})
        with pytest.raises(DatasetError, match=r"2 <\|m1\|> marker.* but 1 item"):
            writer.add("<|m1|> <|m1|>", "x", {"m1": [row]})
        with pytest.raises(EmbeddingError, match="unknown modality 'm9'"):
            writer.add("x", "x", {"m9": [row]})
        with pytest.raises(DatasetError, match="no item 7"):
            writer.add("<|m1|>", "x", {"m1": [7]})
        with pytest.raises(EmbeddingError, match="NaN"):
            writer.add("<|m1|>", "x", {"m1": [row * float("nan")]})
        writer.add("<|m1|>", "x", {"m1": [row]})
    with pytest.raises(DatasetError, match="not empty"), DatasetWriter(tmp_path / "data", SPECS):
        pass


# -- validation --------------------------------------------------------------------------------


def test_a_good_dataset_is_summarised(tmp_path, tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    summary = validate(write_small(tmp_path / "data"), specs, tokenizer=tokenizer)
    assert summary.samples == 4
    assert summary.rows == {"m1": 3, "m2": 1}
    assert summary.longest > 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "  "}, "an answer is empty"),
        ({"answer": 3}, "'answer' is missing or not a string"),
        ({"prompt": "<|m1|>"}, r"1 <\|m1\|> marker\(s\), but 2 item"),
        ({"prompt": "<|m1|><|m1|><|m2|>"}, "no 'm2' item"),
        ({"answer": "so <|m1|>"}, r"an answer holds <\|m1\|>"),
        ({"items": {"m1": [0, 9]}}, r"item 9: rows are missing; rows-m1.safetensors has 2"),
        ({"items": {"m1": [0, -1]}}, "item -1: rows are missing"),
        ({"items": {"m1": [0, "a"]}}, "expected a list of item numbers"),
        ({"items": {"m1": [0, 1], "m9": [0]}}, "unknown modality 'm9'"),
        ({"items": []}, "expected an object of lists"),
        ({"label": 1}, r"unknown fields \['label'\]"),
    ],
)
def test_bad_lines(tmp_path, fields, message):
    path = write_small(tmp_path / "data")
    rewrite_line(path, 1, **fields)
    with pytest.raises(DatasetError, match=rf"data.jsonl:1: .*{message}"):
        validate(path, SPECS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not a list of messages"),
        ([{"role": "user"}], "exactly 'role' and 'content'"),
        ([{"role": "user", "content": "?"}], "ends with the assistant"),
        ([{"role": "bot", "content": "?"}], "role is not one of"),
        ([{"role": "user", "content": "<|m2|>"}, {"role": "assistant", "content": ""}], "is empty"),
    ],
)
def test_bad_conversations(tmp_path, messages, message):
    path = write_small(tmp_path / "data")
    rewrite_line(path, 2, messages=messages)
    with pytest.raises(DatasetError, match=rf"data.jsonl:2: .*{message}"):
        validate(path, SPECS)


def test_every_bad_line_is_reported(tmp_path):
    path = write_small(tmp_path / "data")
    rewrite_line(path, 1, answer="")
    rewrite_line(path, 3, answer="")
    (path / "data.jsonl").open("a").write("not json\n\n")
    with pytest.raises(DatasetError) as error:
        validate(path, SPECS)
    assert [p.split(": ")[0].rsplit(":", 1)[1] for p in error.value.problems] == [
        "1",
        "3",
        "5",
        "6",
    ]
    with pytest.raises(DatasetError) as error:
        validate(path, SPECS, limit=2)
    assert len(error.value.problems) == 2


def test_rows_of_another_width(tmp_path):
    path = write_small(tmp_path / "data")
    wide = parse_modalities({"m1": 5, "m2": 6})
    with pytest.raises(
        DatasetError, match=r"data.jsonl:1: .*rows of width 4 in rows-m1.*expected 5"
    ):
        validate(path, wide)


def test_nan_is_found_with_its_line(tmp_path):
    path = write_small(tmp_path / "data")
    rows = load_file(path / "rows-m1.safetensors")["rows"].clone()
    rows[1, 2] = float("nan")
    save_file({"rows": rows}, path / "rows-m1.safetensors")
    with pytest.raises(
        DatasetError, match=r"data.jsonl:1: rows-m1.safetensors: item 0: NaN or Inf in row 1"
    ):
        validate(path, SPECS)


def test_too_many_rows_and_missing_files(tmp_path):
    path = write_small(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"data.jsonl:1: .*got 2 rows, expected 1 to 1"):
        validate(path, parse_modalities({"m1": {"dim": 4, "max_rows": 1}, "m2": 6}))
    (path / "rows-m2.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"data.jsonl:2: .*there is no rows-m2.safetensors"):
        validate(path, SPECS)
    with pytest.raises(DatasetError, match="no dataset"):
        validate(tmp_path, SPECS)


def test_truncated_files(tmp_path):
    path = write_small(tmp_path / "data")
    file = path / "rows-m1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DatasetError, match=r"rows-m1.safetensors: cannot be read"):
        validate(path, SPECS)
    path = write_small(tmp_path / "other")
    save_file({"offsets": torch.tensor([0, 7, 3])}, path / "items-m1.safetensors")
    with pytest.raises(DatasetError, match="offsets do not rise from 0 to 3"):
        validate(path, SPECS)
    (path / "data.jsonl").write_text("")
    with pytest.raises(DatasetError, match="no sample"):
        validate(path, SPECS)


def test_length_is_checked_with_a_tokenizer(tmp_path, tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    path = write_small(tmp_path / "data")
    with pytest.raises(
        DatasetError, match=r"data.jsonl:1: \d+ tokens with rows, expected at most 8"
    ):
        validate(path, specs, tokenizer=tokenizer, max_length=8)


def test_an_empty_dataset(tmp_path):
    path = write_small(tmp_path / "data")
    (path / "data.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"data.jsonl:1: there is no sample"):
        validate(path, SPECS)
    assert len(RowsDataset(path)) == 0


# -- Parquet -----------------------------------------------------------------------------------


def to_parquet(path: Path, items: str = "map", **options) -> Path:
    """The dataset with its text as Parquet."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [json.loads(line) for line in (path / "data.jsonl").read_text().splitlines()]
    numbers = arrow.list_(arrow.int64())
    kinds = {"map": arrow.map_(arrow.string(), numbers)}
    kinds["struct"] = arrow.struct({"m1": numbers, "m2": numbers})
    message = arrow.struct({"role": arrow.string(), "content": arrow.string()})
    columns = {"prompt": arrow.string(), "answer": arrow.string()}
    columns |= {"messages": arrow.list_(message), "items": kinds[items]}
    rows = [{name: line.get(name) for name in columns} for line in lines]
    if items == "map":
        for row in rows:
            row["items"] = list((row["items"] or {}).items())
    table = arrow.Table.from_pylist(rows, schema=arrow.schema(columns))
    parquet.write_table(table, path / "data.parquet", **options)
    (path / "data.jsonl").unlink()
    return path


@pytest.mark.parametrize("items", ["map", "struct"])
def test_parquet_is_what_json_lines_are(tmp_path, tokenizer_and_specs, items):
    tokenizer, specs = tokenizer_and_specs
    want = RowsDataset(write_small(tmp_path / "lines"))
    path = to_parquet(write_small(tmp_path / "rows"), items, row_group_size=1)
    for dataset in (RowsDataset(path), RowsDataset(path / "data.parquet")):
        assert len(dataset) == 4
        for at in (3, 0, 2, 1, -1):
            got, expected = dataset[at], want[at]
            assert got.sample == expected.sample
            for name, rows in expected.rows.items():
                assert all(map(torch.equal, got.rows[name], rows))
        with pytest.raises(IndexError):
            dataset[4]
    assert dataset[0].where.endswith("data.parquet:1")
    assert len(dataset._lines._groups) <= 4
    assert validate(path, specs, tokenizer=tokenizer) == validate(
        tmp_path / "lines", specs, tokenizer=tokenizer
    )
    assert pickle.loads(pickle.dumps(dataset))[2].sample == want[2].sample


def test_bad_rows_of_parquet_are_reported_as_lines_are(tmp_path):
    path = write_small(tmp_path / "data")
    rewrite_line(path, 1, items={"m1": [0, 9]})
    rewrite_line(path, 3, answer="  ")
    to_parquet(path)
    with pytest.raises(DatasetError) as error:
        validate(path, SPECS)
    first, second = error.value.problems
    assert "data.parquet:1: modality 'm1', item 9: rows are missing" in first
    assert "data.parquet:3: an answer is empty" in second
    with pytest.raises(DatasetError, match=r"data.parquet:3: an answer is empty"):
        RowsDataset(path)[2]


def test_parquet_files_that_cannot_be_read(tmp_path, monkeypatch):
    path = to_parquet(write_small(tmp_path / "data"))
    (path / "data.jsonl").touch()
    with pytest.raises(DatasetError, match=r"holds data.jsonl and data.parquet"):
        RowsDataset(path)
    (path / "data.jsonl").unlink()
    whole = (path / "data.parquet").read_bytes()
    (path / "data.parquet").write_bytes(whole[:-20])
    with pytest.raises(DatasetError, match=r"data.parquet: cannot be read"):
        validate(path, SPECS)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write_small(tmp_path / "data")
    (path / "data.jsonl").rename(path / "data.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"needs pyarrow: pip install 'mmqwen\[parquet\]'"):
        RowsDataset(path)


# -- what is no text -----------------------------------------------------------------------------

HALF = "a \ud83d b"
DEEP = b'{"prompt": "a", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": HALF + "<|m1|><|m1|>"},
        {"answer": HALF},
        {"items": {"m1": [0, 1], HALF: []}},
        {"prompt": None, "messages": [{"role": "user", "content": HALF}]},
    ],
)
def test_half_a_surrogate_pair_is_named_by_line(tmp_path, tokenizer_and_specs, fields):
    """JSON may spell it, and no tokenizer takes it; the lines after it are checked all the same."""
    tokenizer, specs = tokenizer_and_specs
    path = write_small(tmp_path / "data")
    rewrite_line(path, 3, answer="")
    if "messages" in fields:
        fields = {"messages": [*fields["messages"], {"role": "assistant", "content": "b"}]}
        rewrite_line(path, 2, **fields, items={})
    else:
        rewrite_line(path, 1, **fields)
    line = 2 if "messages" in fields else 1
    for known in (None, tokenizer):
        with pytest.raises(DatasetError) as error:
            validate(path, specs, tokenizer=known)
        first, second = error.value.problems
        assert rf"data.jsonl:{line}: '\ud83d' in " in first
        assert "half of a surrogate pair" in first
        assert "data.jsonl:3: an answer is empty" in second
        str(error.value).encode()  # a message can be printed
    with pytest.raises(DatasetError, match=rf"data.jsonl:{line}: .*surrogate"):
        RowsDataset(path)[line - 1]


def test_half_a_surrogate_pair_in_a_sample_made_by_hand(tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    example = Example(Sample(prompt=HALF, answer="b"), {}, "here:7")
    with pytest.raises(DatasetError, match=r"here:7: .*half of a surrogate pair"):
        Collator(tokenizer, specs)([example])


def test_json_that_is_nested_too_deeply_is_named_by_line(tmp_path):
    path = write_small(tmp_path / "data")
    lines = (path / "data.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = DEEP
    (path / "data.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(DatasetError, match=r"data.jsonl:3: .*nested too deeply"):
        validate(path, SPECS)
    with pytest.raises(DatasetError, match=r"data.jsonl:3: .*nested too deeply"):
        RowsDataset(path)[2]
    assert RowsDataset(path)[3].sample.answer == " four"


def test_the_writer_refuses_what_is_no_text(tmp_path):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    row = torch.ones(4)
    with DatasetWriter(tmp_path / "data", SPECS) as writer:
        with pytest.raises(DatasetError, match=r"sample 1: .*half of a surrogate pair"):
            writer.add(HALF + "<|m1|>", "x", {"m1": [row]})
        with pytest.raises(DatasetError, match=r"sample 1: .*half of a surrogate pair"):
            writer.add_messages(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": HALF}]
            )
        with pytest.raises(DatasetError, match=r"sample 1: .*nested too deeply"):
            writer.add_messages([{"role": "user", "content": deep}])
        with pytest.raises(DatasetError, match="sample 1: a message is not an object"):
            writer.add_messages(["hello"])
        writer.add("<|m1|>", "x", {"m1": [row]})
    assert RowsDataset(tmp_path / "data").store("m1").num_items == 1  # none of a refused sample
    while deep:  # in a loop: to free it at once would recurse, too
        deep = deep.pop()


@pytest.mark.parametrize("line", [DEEP, json.dumps({"prompt": HALF, "answer": "x"}).encode()])
def test_the_converter_names_the_line_that_is_no_text(tmp_path, line):
    source = make_npy_folder(tmp_path / "source")
    with (source / "samples.jsonl").open("ab") as stream:
        stream.write(b"\n" + line)
    with pytest.raises(DatasetError, match=r"samples.jsonl:3: .*(nested|surrogate)"):
        from_npy_folder(source, tmp_path / "data", SPECS)
    line = json.dumps({"prompt": "<|m1|>", "answer": "x", "items": {"m1": [HALF]}})
    (source / "samples.jsonl").write_text(line)
    with pytest.raises(DatasetError, match=r"samples.jsonl:1: .*surrogate"):
        from_npy_folder(source, tmp_path / "data", SPECS)
    assert not (tmp_path / "data").exists()


def test_parquet_names_the_row_that_is_no_text(tmp_path):
    """Parquet holds bytes that it calls text; the rows around them are checked all the same."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [b"a", HALF.encode("utf-8", "surrogatepass"), b"c", b"d"]
    column = arrow.array(texts, arrow.binary()).view(arrow.string())
    answers = arrow.array(["x", "y", "", "z"])
    (tmp_path / "data").mkdir()
    table = arrow.table({"prompt": column, "answer": answers})
    parquet.write_table(table, tmp_path / "data/data.parquet", row_group_size=3)
    with pytest.raises(DatasetError) as error:
        validate(tmp_path / "data", SPECS)
    first, second = error.value.problems
    assert "data.parquet:2: a text is not UTF-8" in first
    assert "data.parquet:3: an answer is empty" in second
    dataset = RowsDataset(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"data.parquet:2: a text is not UTF-8"):
        dataset[1]
    assert dataset[3].sample.prompt == "d"


# -- encoding ----------------------------------------------------------------------------------


def test_only_the_answer_is_learnt(tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    sample = Sample(prompt="Describe <|m1|> now", answer=" a train")
    encoding = encode(sample, {"m1": [3]}, tokenizer, specs)
    learnt = [t for t in encoding.labels if t != -100]
    assert tokenizer.decode(learnt) == " a train<|im_end|>"
    assert encoding.token_ids.count(specs["m1"].token_id) == 3
    assert encoding.labels[-len(learnt) :] == learnt  # and nothing before
    assert encoding.items == [("m1", 0)]
    # The prompt is what serving makes of it.
    prompt = tokenizer("Describe <|m1|><|m1|><|m1|> now")["input_ids"]
    assert encoding.token_ids[: -len(learnt)] == prompt


def test_every_answer_of_a_conversation_is_learnt(tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    messages = tuple(
        {"role": role, "content": text}
        for role, text in [
            ("user", "What <|m2|>?"),
            ("assistant", "one"),
            ("user", "And <|m1|>?"),
            ("assistant", "two"),
        ]
    )
    encoding = encode(Sample(messages=messages), {"m1": [2], "m2": [1]}, tokenizer, specs)
    learnt = tokenizer.decode([t for t in encoding.labels if t != -100])
    assert learnt == "one<|im_end|>two<|im_end|>"
    assert encoding.items == [("m2", 0), ("m1", 0)]
    text = tokenizer.decode(encoding.token_ids)
    assert text.startswith("<|im_start|>user\nWhat <|m2|>?<|im_end|>")
    assert "<|m1|><|m1|>?" in text


def test_a_template_that_rewrites_the_past_is_refused(tokenizer_and_specs):
    tokenizer, specs = tokenizer_and_specs
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        )
        with pytest.raises(ValueError, match="rewrites earlier messages"):
            encode(Sample(messages=messages), {}, tokenizer, specs)
    finally:
        tokenizer.chat_template = own


# -- conversion --------------------------------------------------------------------------------


def make_npy_folder(path: Path) -> Path:
    (path / "cats").mkdir(parents=True)
    np.save(path / "cats/1.npy", np.arange(4, dtype=np.float32))
    np.save(path / "cats/2.npy", np.ones((2, 4)))
    lines = [
        {"prompt": "<|m1|>", "answer": "a", "items": {"m1": ["cats/1.npy"]}},
        {"prompt": "<|m1|> <|m1|>", "answer": "b", "items": {"m1": ["cats/2.npy", "cats/1.npy"]}},
    ]
    (path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_folder_of_npy_files(tmp_path):
    source = make_npy_folder(tmp_path / "source")
    dataset = RowsDataset(from_npy_folder(source, tmp_path / "data", SPECS))
    assert dataset[1].counts == {"m1": [2, 1]}
    assert dataset.store("m1").num_items == 2
    assert torch.equal(dataset[1].rows["m1"][1], torch.arange(4.0).view(1, 4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cats/2.npy", np.ones(5), "width 5"),
        ("cats/2.npy", np.array([object()]), "cannot be read"),  # a pickle
        ("cats/2.npy", np.array([1.0, np.nan, 0, 0]), "NaN"),
        ("cats/2.npy", np.array([1, 2, 3, 4]), "dtype int64"),
        ("cats/2.npy", None, "cannot be read"),
    ],
)
def test_bad_npy_files_are_named_by_line(tmp_path, name, content, message):
    source = make_npy_folder(tmp_path / "source")
    if content is None:
        (source / name).unlink()
    else:
        np.save(source / name, content, allow_pickle=True)
    with pytest.raises(DatasetError, match=rf"samples.jsonl:2: .*{message}"):
        from_npy_folder(source, tmp_path / "data", SPECS)
    assert not (tmp_path / "data").exists()


def test_npy_files_elsewhere_are_not_read(tmp_path):
    source = make_npy_folder(tmp_path / "source")
    np.save(tmp_path / "secret.npy", np.ones(4))
    line = {"prompt": "<|m1|>", "answer": "a", "items": {"m1": ["../secret.npy"]}}
    (source / "samples.jsonl").write_text(json.dumps(line))
    with pytest.raises(DatasetError, match="lies outside"):
        from_npy_folder(source, tmp_path / "data", SPECS)
