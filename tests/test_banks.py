"""Banks without vLLM: their files, what checks them, packs that name rows, and the HF processor."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from bank_tables import VERSION, Tables
from safetensors.torch import save_file

from mmqwen.banks import (
    BankCatalog,
    BankError,
    BankRows,
    build_bank,
    check_bank,
    open_bank,
    parse_bank_flags,
    parse_banks,
)
from mmqwen.banks.file import facts_file, keys_file
from mmqwen.cli import main
from mmqwen.modalities import parse_modalities
from mmqwen.pack_slices import find_rows
from mmqwen.packs import PackError, allocate_pack, bank_group, directory, open_pack, write_ids
from mmqwen_kernels import HostRows, Projector, fuse_embeddings, plan_rows
from tiny import make_composite

SPECS = parse_modalities({"m1": 24, "m2": 40})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank(tmp_path):
    np.save(tmp_path / "rows.npy", draw(20, 24).numpy())
    (tmp_path / "names").write_text("".join(f"K{row}\n" for row in range(20)))
    return build_bank(
        tmp_path / "rows.npy", tmp_path / "items.bank", modality="m1", keys=tmp_path / "names"
    )


# -- files ---------------------------------------------------------------------------------------


def test_a_bank_is_a_safetensors_file_with_its_version_and_keys_beside_it(bank):
    again = open_bank(bank.file)
    assert torch.equal(again.rows, draw(20, 24))
    assert again.modality == "m1"
    assert again.facts == bank.facts
    assert again.keys.rows(["K19", "K0", "k0", "", "\ud800"]) == [19, 0, None, None, None]
    assert check_bank(bank.file).version == bank.version
    from blake3 import blake3

    assert blake3(bank.file.read_bytes()).hexdigest() == bank.version


def test_a_folder_is_joined_in_the_order_of_names(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    np.save(parts / "a.npy", draw(3, 24).double().numpy())
    save_file({"x": draw(2, 24, seed=1)}, parts / "b.safetensors")
    np.save(parts / "c.npy", draw(24, seed=2).numpy())
    made = build_bank(parts, tmp_path / "x.bank", modality="m1", dtype="bfloat16")
    expected = torch.cat([draw(3, 24), draw(2, 24, seed=1), draw(1, 24, seed=2)]).bfloat16()
    assert torch.equal(made.rows, expected)


def test_blocks_give_the_same_file_as_one(tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", draw(50, 24).numpy())
    one = build_bank(tmp_path / "rows.npy", tmp_path / "one.bank", modality="m1")
    monkeypatch.setattr("mmqwen.banks.file.BLOCK_BYTES", 700)
    other = build_bank(tmp_path / "rows.npy", tmp_path / "other.bank", modality="m1")
    facts_file(other.file).unlink()
    scanned = open_bank(other.file)
    assert one.version == other.version == scanned.version
    assert one.facts.largest == scanned.facts.largest == float(draw(50, 24).abs().max())


def test_a_plain_safetensors_file_is_looked_through_once(tmp_path):
    file = tmp_path / "items.safetensors"
    save_file({"rows": draw(4, 24)}, file)
    first = open_bank(file)
    assert first.modality is None
    stored = json.loads(facts_file(file).read_text())
    assert stored["version"] == first.version
    save_file({"rows": draw(4, 24, seed=1)}, file)  # of the same size
    assert open_bank(file).version != first.version


def test_a_pickled_bank_carries_no_rows(bank):
    assert torch.equal(bank.rows, draw(20, 24))
    raw = pickle.dumps(bank)
    assert len(raw) < 500
    assert pickle.loads(raw).version == bank.version


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[1.0, np.nan], [2.0, 3.0]]), "NaN or Inf in row 0"),
        (np.array([[1.0], [1e300]]), "beyond the range of float32"),
        (np.array([[1, 2]]), "expected float16"),
        (np.zeros((2, 3, 4)), "expected floating"),
        (np.zeros((0, 4)), "expected floating"),
    ],
)
def test_rows_that_are_none_make_no_bank(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(BankError, match=words):
        build_bank(tmp_path / "x.npy", tmp_path / "x.bank", modality="m1")
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\n", "got 2 keys, expected 3"),
        ("a\nb\na\n", "key 'a' stands in line 1 and in line 3"),
        ("a\n\nc\n", ":2: a key is empty"),
    ],
)
def test_keys_are_one_a_row(tmp_path, text, words):
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    (tmp_path / "k").write_text(text)
    with pytest.raises(BankError, match=words):
        build_bank(tmp_path / "x.npy", tmp_path / "x.bank", modality="m1", keys=tmp_path / "k")


def test_damaged_files_are_refused(bank, tmp_path):
    with pytest.raises(BankError, match="cannot be read"):
        open_bank(tmp_path / "none.bank")
    raw = bank.file.read_bytes()
    cut = tmp_path / "cut.bank"
    cut.write_bytes(raw[:-8])
    with pytest.raises(BankError, match="whole safetensors file"):
        open_bank(cut)
    save_file({"other": draw(2, 2)}, cut)
    with pytest.raises(BankError, match="expected one called 'rows'"):
        open_bank(cut)
    save_file({"rows": draw(2)}, cut)
    with pytest.raises(BankError, match=r"expected \[rows, width\]"):
        open_bank(cut)
    save_file({"rows": torch.full((2, 2), float("inf"))}, cut)
    with pytest.raises(BankError, match="NaN or Inf in row 0"):
        open_bank(cut)
    stat = bank.file.stat()
    bank.file.write_bytes(raw[:-4] + bytes(4))
    os.utime(bank.file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    with pytest.raises(BankError, match="changed in place"):
        check_bank(bank.file)


def test_the_command_line(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", draw(20, 24).numpy())
    file = str(tmp_path / "items.bank")
    build = ["bank", "build", str(tmp_path / "rows.npy"), "--modality", "m1", "-o", file]
    assert main(build) == 0
    assert main(["bank", "check", file]) == 0
    assert capsys.readouterr().out.count("20 rows of 24 float32, modality m1, without keys") == 2
    assert main(["bank", "check", str(tmp_path / "rows.npy")]) == 2
    assert "cannot be read as a bank" in capsys.readouterr().err


# -- where they are named ------------------------------------------------------------------------


def test_flags_and_configs():
    assert parse_bank_flags(["a=/x:y.bank:placement=host", "b=c:modality=m1"]) == {
        "a": {"file": "/x:y.bank", "placement": "host"},
        "b": {"file": "c", "modality": "m1"},
    }
    found = parse_bank_flags(["a=b:modality=m1:placement=projected"])
    assert parse_banks(found)["a"].to_dict() == {
        "file": "b", "modality": "m1", "placement": "projected"
    }  # fmt: skip
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(BankError, match="expected NAME=FILE"):
            parse_bank_flags([wrong])
    with pytest.raises(BankError, match="twice"):
        parse_bank_flags(["a=b", "a=c"])
    for raw, words in (
        ([], "expected a dict"),
        ({"a b": "x"}, "no identifier"),
        ({"a": {"modality": "m1"}}, "'file'"),
        ({"a": {"file": "x", "size": 1}}, "unknown fields"),
        ({"a": {"file": "x", "placement": "moon"}}, "expected one of"),
    ):
        with pytest.raises(BankError, match=words):
            parse_banks(raw)


def test_banks_that_do_not_fit_the_model_are_refused(bank):
    def catalog(dtype=None, specs=SPECS, **fields):
        return BankCatalog(parse_banks({"items": {"file": bank.file, **fields}}), specs, dtype)

    assert catalog().to_dict()["items"]["version"] == bank.version
    for fields, words in (
        ({"modality": "m2"}, "'m2' in the config and 'm1' in"),
        ({"version": "00"}, "expected '00'"),
        ({"specs": parse_modalities({"m1": 23})}, "24 wide, expected 23"),
        ({"specs": parse_modalities({"m3": 24})}, "unknown modality 'm1'"),
    ):
        with pytest.raises(BankError, match=f"bank 'items': .*{words}"):
            catalog(**fields)
    large = bank.file.with_name("large.safetensors")
    save_file({"rows": torch.full((1, 24), 1e5)}, large)
    specs = parse_banks({"large": {"file": large, "modality": "m1"}})
    assert BankCatalog(specs, SPECS, torch.bfloat16).banks
    with pytest.raises(BankError, match="beyond the range of float16"):
        BankCatalog(specs, SPECS, torch.float16)


def test_a_checkpoint_has_its_banks_with_it_and_the_hf_processor_reads_them(bank, tmp_path):
    from mmqwen.checkpoint import build_checkpoint
    from mmqwen.checkpoint.shards import copy_small_files
    from mmqwen.hf import MultimodalQwen3Processor

    make_composite(tmp_path / "first")
    model = build_checkpoint(
        tmp_path / "first-base", {"m1": 24}, tmp_path / "model", banks={"items": bank.file}
    )
    config = json.loads((model / "config.json").read_text())
    assert config["banks"]["items"]["file"] == "banks/items.bank"
    bank.file.unlink()
    copy_small_files(model, tmp_path / "first")  # as training does
    for folder in (model, tmp_path / "first"):
        processor = MultimodalQwen3Processor.from_pretrained(folder)
        rows = draw(20, 24)
        batch = processor(
            "see <|m1|> and <|m1|>",
            {"m1": [BankRows("items", [3, 1]), {"bank": "items", "keys": ["K7"]}]},
        )
        assert torch.equal(batch["embeddings"]["m1"], rows[[3, 1, 7]])
        with pytest.raises(ValueError, match="id 20 of bank 'items', expected 0 to 19"):
            processor("see", {"m1": BankRows("items", [20])})
    assert keys_file(model / "banks" / "items.bank").exists()


def test_a_dataset_reads_a_bank_s_rows_by_id(bank, tmp_path):
    """A bank is a file of rows as datasets have it, in which each row is an item."""
    from mmqwen.data import RowsDataset, validate

    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "rows-m1.safetensors").symlink_to(bank.file)
    line = {"prompt": "<|m1|><|m1|> next?", "answer": "yes", "items": {"m1": [17, 5]}}
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    validate(folder, SPECS)
    (first,) = list(RowsDataset(folder))
    assert torch.equal(torch.cat(first.rows["m1"]), draw(20, 24)[[17, 5]])
    line["items"]["m1"][0] = 20
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="item 20: rows are missing"):
        validate(folder, SPECS)


def test_the_page_s_commands_and_snippet_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "banks.md").read_text(encoding="utf-8")
    make_composite(tmp_path / "checkpoint")
    np.save("items.npy", draw(20, 24).numpy())
    Path("names.txt").write_text("".join(f"B{row:03}\n" for row in range(20)))
    commands = re.findall(r"^mmqwen (bank .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command)) == 0
    snippets = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", page, flags=re.DOTALL))
    assert list(snippets) == ["generate", "update"]
    names = {}
    exec(compile(snippets["generate"], "banks.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1]
    np.save("items.npy", draw(30, 24, seed=1).numpy())
    build_bank("items.npy", "items-2.bank", modality="m1")
    exec(compile(snippets["update"], "banks.md", "exec"), names)
    processor = names["pipeline"]._engine.processor
    assert torch.equal(processor.bank_catalog.banks["items"].bank.rows, draw(30, 24, seed=1))


# -- packs and plans -----------------------------------------------------------------------------


def one_bank(rows, resident):
    """A bank of modality 0, number 1; number 0 is of modality 1."""
    return Tables([(1, draw(2, 40), False), (0, rows, resident)])


def mixed_pack(dtype=torch.float32):
    group = bank_group(0, 1)
    shapes = {0: (2, 24), group: (3, 24), 1: (1, 40)}
    pack, views = allocate_pack([0, group, 1, 0, group], [1, 2, 1, 1, 1], shapes, dtype)
    views[0].copy_(draw(2, 24))
    views[1].copy_(draw(1, 40, seed=1))
    write_ids(pack, group, np.array([4, 0, 7]), VERSION)
    return pack


def test_a_pack_names_rows_beside_its_own():
    pack = mixed_pack()
    rows, groups = open_pack(pack)
    kinds = [group[:3] for group in groups]
    assert kinds == [(0, 24, None), (0, 24, 1), (1, 40, None)]
    assert groups[1].version == VERSION
    table = draw(9, 24, seed=2)
    found = find_rows([rows[1:], rows[:1]], [24, 40], torch.float32, one_bank(table, False))
    assert found.modality.tolist() == [0, 0, 1, 0, 0, 0]
    first = np.array(table.data_ptr())
    assert (found.address[[0, 1, 4]] - first).tolist() == [4 * 96, 0, 7 * 96]
    with pytest.raises(PackError, match="there are no banks"):
        find_rows([rows], [24, 40], torch.float32)
    with pytest.raises(PackError, match="no such row"):
        find_rows([rows], [24, 40], torch.float32, one_bank(table[:7], False))


@pytest.mark.parametrize("resident", [False, True])
def test_a_step_of_rows_that_travel_and_rows_that_stay(resident):
    table, tokens = draw(9, 24, seed=2), draw(11, 16, seed=3)
    rows = directory(mixed_pack())
    found = find_rows([rows[2:], rows], [24, 40], torch.float32, one_bank(table, resident))
    assert (found.resident is not None) == resident
    sent = {0: draw(2, 24), 1: draw(1, 40, seed=1)}
    order = [sent[0][0], table[4], table[0], sent[1][0], sent[0][1], table[7]]
    order = [*order[2:], *order]
    mask = torch.tensor([False, *[True] * 5, False, *[True] * 5])
    plan = plan_rows(found, mask, 12, [24, 40], dtype=torch.float32, device="cpu")
    wide = [row for row in order if len(row) == 40]
    assert torch.equal(plan.rows[0], torch.stack([row for row in order if len(row) == 24]))
    assert torch.equal(plan.rows[1], torch.stack(wide))
    assert (plan.addresses_at >= 0) == resident
    projectors = [Projector(draw(8, d), draw(8), draw(16, 8), draw(16)) for d in (24, 40)]
    ids = torch.arange(12) % 11
    fused = fuse_embeddings(ids, tokens, plan, projectors, backend="torch")
    same = [(int(len(row) == 40), row.unsqueeze(0)) for row in order]
    expected = fuse_embeddings(ids, tokens, same, projectors, slots=mask, backend="torch")
    assert torch.equal(fused, expected)


def test_all_rows_stay():
    table = draw(9, 24, seed=2)
    address = table.data_ptr() + np.array([3, 8, 3]) * 96
    rows = HostRows(np.zeros(3, np.int64), address, np.ones(3, np.bool_), (table,))
    plan = plan_rows(rows, [4, 0, 2], 5, [24], dtype=torch.float32, device="cpu")
    assert plan.rows_at == (-1,)
    assert torch.equal(plan.rows[0], table[[3, 8, 3]])
    assert plan.slots[0].tolist() == [4, 0, 2]
