"""What a modality is, and the marker rules, against a reference that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmqwen.modalities import (
    RESERVED_NAMES,
    ModalityError,
    ModalitySpec,
    assign_token_ids,
    check_no_markers,
    expand_markers,
    parse_modalities,
)

SPECS = parse_modalities(
    {
        "a": {"dim": 4, "token_id": 100},
        "b": {"dim": 8, "token_id": 101},
        "c": {"dim": 2, "token_id": 102},
    }
)


# -- descriptions ------------------------------------------------------------------------------


def test_parse_modalities_reads_widths_dicts_and_specs_in_order():
    specs = parse_modalities(
        {"z": 3, "m1": {"dim": 768, "max_rows": 7}, "s": ModalitySpec("s", 5, token="<S>")}
    )
    assert list(specs) == ["z", "m1", "s"]
    assert specs["z"] == ModalitySpec("z", 3, None, "<|z|>", None, 1024)
    assert specs["m1"].max_rows == 7
    assert specs["s"].token == "<S>"


def test_config_form_round_trips():
    raw = {name: spec.to_dict() for name, spec in SPECS.items()}
    assert raw["a"] == {"dim": 4, "token": "<|a|>", "token_id": 100, "max_rows": 1024}
    assert parse_modalities(raw) == SPECS


@pytest.mark.parametrize(
    "raw",
    [
        {"m1": {}},
        {"m1": {"dim": 0}},
        {"m1": {"dim": -1}},
        {"m1": {"dim": True}},
        {"m1": {"dim": 7.0}},
        {"m1": {"dim": "7"}},
        {"m1": {"dim": 7, "hidden_dim": 0}},
        {"m1": {"dim": 7, "max_rows": 0}},
        {"m1": {"dim": 7, "token_id": -1}},
        {"m1": {"dim": 7, "wdith": 3}},
        {"m1": "768"},
        {"m1": True},
        {"": 7},
        {"1m": 7},
        {"a b": 7},
        {"a\n": 7},
        {"x" * 65: 7},
        {"m1": {"dim": 1, "token": "<|t|>"}, "m2": {"dim": 1, "token": "<|t|>"}},
        {"m1": {"dim": 1, "token_id": 5}, "m2": {"dim": 1, "token_id": 5}},
        *({name: 7} for name in sorted(RESERVED_NAMES)),
    ],
    ids=str,
)
def test_parse_modalities_refuses(raw):
    with pytest.raises(ModalityError):
        parse_modalities(raw)


def test_assign_token_ids_prefers_its_own_then_the_tokenizers_then_free_ones():
    specs = parse_modalities({"a": {"dim": 1, "token_id": 50}, "b": 1, "c": 1, "d": 1})
    got = assign_token_ids(specs, {"<|b|>": 7}, first_free_id=49)
    assert {name: spec.token_id for name, spec in got.items()} == {
        "a": 50,
        "b": 7,
        "c": 49,
        "d": 51,
    }
    assert assign_token_ids(got, {"<|b|>": 7}, first_free_id=49) == got


def test_assign_token_ids_refuses_a_contradiction():
    specs = parse_modalities({"a": {"dim": 1, "token_id": 50}})
    with pytest.raises(ModalityError, match="has id 51"):
        assign_token_ids(specs, {"<|a|>": 51}, first_free_id=60)


def test_assign_token_ids_refuses_an_id_that_spells_something_else():
    specs = parse_modalities({"a": {"dim": 1, "token_id": 50}})
    with pytest.raises(ModalityError, match=r"50 is the tokenizer's '<.im_end.>'"):
        assign_token_ids(specs, {"<|im_end|>": 50}, first_free_id=60)


def test_assigned_ids_never_collide_with_the_tokenizers():
    """A modality that the tokenizer knows may not take an id given to another one."""
    specs = parse_modalities({"a": 1, "b": 1})
    got = assign_token_ids(specs, {"<|b|>": 10}, first_free_id=10)
    ids = [spec.token_id for spec in got.values()]
    assert len(set(ids)) == 2


# -- markers -----------------------------------------------------------------------------------


def naive_expand(token_ids, row_counts):
    """Replace markers one at a time, restarting from the beginning each time."""
    ids = {name: spec.token_id for name, spec in SPECS.items()}
    cells: list[object] = list(token_ids)
    front: list[object] = []
    for name, rows in row_counts.items():
        marked = ids[name] in token_ids
        for index in range(len(rows)):
            if marked:
                cells[cells.index(ids[name])] = (name, index)
            else:
                front.append((name, index))
    out, items, starts = [], [], []
    for cell in front + cells:
        if isinstance(cell, tuple):
            items.append(cell)
            starts.append(len(out))
            out += [ids[cell[0]]] * row_counts[cell[0]][cell[1]]
        else:
            out.append(cell)
    return out, items, starts


@st.composite
def prompts(draw):
    """Text ids with a marker per item of some modalities, in any order, and none of the others."""
    names = draw(st.lists(st.sampled_from(sorted(SPECS)), unique=True))
    row_counts = {name: draw(st.lists(st.integers(1, 4), max_size=4)) for name in names}
    cells = draw(st.lists(st.integers(0, 99), max_size=12))
    for name, rows in row_counts.items():
        if draw(st.booleans()):
            cells += [SPECS[name].token_id] * len(rows)
    return draw(st.permutations(cells)), row_counts


@given(prompts())
@settings(max_examples=300, deadline=None)
def test_expand_markers_equals_the_naive_reference(case):
    token_ids, row_counts = case
    got = expand_markers(token_ids, SPECS, row_counts)
    assert (got.token_ids, got.items, got.starts) == naive_expand(token_ids, row_counts)


@given(prompts())
@settings(max_examples=300, deadline=None)
def test_expand_markers_places_every_item_once_and_keeps_the_text(case):
    token_ids, row_counts = case
    got = expand_markers(token_ids, SPECS, row_counts)
    expected = [(name, i) for name, rows in row_counts.items() for i in range(len(rows))]
    assert sorted(got.items) == sorted(expected)
    for name in row_counts:  # items of one modality keep their order
        assert [i for n, i in got.items if n == name] == list(range(len(row_counts[name])))
    markers = {spec.token_id for spec in SPECS.values()}
    assert [t for t in got.token_ids if t not in markers] == [
        t for t in token_ids if t not in markers
    ]
    covered: list[int] = []  # slots: each item's own, one after another, never overlapping
    for (name, index), start in zip(got.items, got.starts, strict=True):
        slots = range(start, start + row_counts[name][index])
        assert all(got.token_ids[slot] == SPECS[name].token_id for slot in slots)
        covered += slots
    assert covered == [at for at, token in enumerate(got.token_ids) if token in markers]


def test_unmarked_items_go_before_the_text_in_the_order_given():
    got = expand_markers([1, 2], SPECS, {"b": [2], "a": [1, 1]})
    assert got.token_ids == [101, 101, 100, 100, 1, 2]
    assert got.items == [("b", 0), ("a", 0), ("a", 1)]
    assert got.starts == [0, 2, 3]


def test_marked_and_unmarked_modalities_mix():
    got = expand_markers([1, 100, 2], SPECS, {"a": [3], "b": [1]})
    assert got.token_ids == [101, 1, 100, 100, 100, 2]
    assert got.items == [("b", 0), ("a", 0)]


@given(prompts(), st.sampled_from(sorted(SPECS)), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_one_marker_too_many_is_refused(case, name, at):
    token_ids, row_counts = case
    marker = SPECS[name].token_id
    if token_ids.count(marker) == 0 and len(row_counts.get(name, ())) == 1:
        return  # the marker that was added is the right one
    longer = [*token_ids[:at], marker, *token_ids[at:]]
    if token_ids.count(marker) == 0 and not row_counts.get(name):
        message = f"no '{name}' item was given"
    else:
        message = "marker\\(s\\)"
    with pytest.raises(ModalityError, match=message):
        expand_markers(longer, SPECS, row_counts)


def test_fewer_markers_than_items_and_unknown_modalities_are_refused():
    with pytest.raises(ModalityError, match=r"'a': .* 1 <\|a\|> marker\(s\), but 2 item"):
        expand_markers([100], SPECS, {"a": [1, 1]})
    with pytest.raises(ModalityError, match=r"unknown modality 'nope'.*'a', 'b', 'c'"):
        expand_markers([1], SPECS, {"nope": [1]})


def test_check_no_markers():
    check_no_markers([1, 2, 3], SPECS)
    check_no_markers(iter([1, 2]), SPECS)
    for ids in ([1, 101, 101], iter([1, 101, 101])):
        with pytest.raises(ModalityError, match=r"holds 2 <\|b\|> marker"):
            check_no_markers(ids, SPECS)
