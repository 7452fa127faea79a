"""Rows that spell tokens: a reference for served rows that needs no second implementation.

A modality as wide as the model, with the projector W1 = [I; -I], W2 = [I, -I] and no biases,
projects a row to itself exactly: relu(x) - relu(-x) = x. An item of some tokens' embedding rows
must then be answered as those tokens are, by the same engine, whatever the text model, its
quantisation, the parallelism or the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmqwen.banks import BankRows, build_bank
from tiny import make_composite

WIDTHS = {"m1": 24, "m2": 40}
TOKENS = range(3, 300)
"""Ordinary tokens of the tiny tokenizer, from which prompts are drawn."""


def make_spelling_checkpoint(path: Path, hidden_size: int = 256, **fields: Any) -> Path:
    """A composite checkpoint with modalities m1, m2 and `spell`; see `tiny.make_composite`."""
    folder = make_composite(path, spelling(hidden_size), hidden_size=hidden_size, **fields)
    return spell_exactly(folder, hidden_size)


def spelling(hidden_size: int) -> dict[str, Any]:
    """The modalities m1, m2 and `spell`, which is as wide as the model."""
    return {**WIDTHS, "spell": {"dim": hidden_size, "hidden_dim": 2 * hidden_size}}


def spell_exactly(folder: Path, hidden_size: int) -> Path:
    """Give a built checkpoint the projector of `spell` that passes rows through."""
    file = folder / "projectors.safetensors"
    weights = load_file(file)
    unit = torch.eye(hidden_size, dtype=weights["projectors.spell.linear_1.weight"].dtype)
    weights["projectors.spell.linear_1.weight"] = torch.cat([unit, -unit])
    weights["projectors.spell.linear_1.bias"].zero_()
    weights["projectors.spell.linear_2.weight"] = torch.cat([unit, -unit], dim=1)
    weights["projectors.spell.linear_2.bias"].zero_()
    file.unlink()
    save_file({k: v.contiguous() for k, v in weights.items()}, file, metadata={"format": "pt"})
    return folder


def token_table(checkpoint: Path) -> torch.Tensor:
    """float32 `[V, D]`."""
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"):
                if name in handle.keys():  # noqa: SIM118 - not a dict
                    return handle.get_tensor(name).float()
    raise FileNotFoundError(f"no token table under {checkpoint}")


def marker_ids(checkpoint: Path) -> dict[str, int]:
    """Placeholder id of each modality."""
    from mmqwen.checkpoint import read_config
    from mmqwen.modalities import parse_modalities

    specs = parse_modalities(read_config(checkpoint).modalities)
    return {name: int(spec.token_id or 0) for name, spec in specs.items()}


def make_pairs(
    checkpoint: Path,
    count: int,
    seed: int,
    *,
    longest: int = 60,
    table: torch.Tensor | None = None,
    banks: Sequence[str] = (),
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Requests in two forms: with tokens as text, and some stretches of them spelled by rows.

    A third of the prompts hold items of m1 and m2 as well, the same in both forms; one in ten is
    text in both. `table` holds the tokens' embeddings where they are not `token_table`'s rows.
    With `banks`, made by `make_bank`, rows that spell are named by ids, of each bank in turns.
    """
    generator = torch.Generator().manual_seed(seed)
    table, ids = token_table(checkpoint) if table is None else table, marker_ids(checkpoint)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    pairs = []
    for at in range(count):
        text: list[int] = []
        spelled: list[int] = []
        shared: dict[str, list[torch.Tensor]] = {}
        rows: list[Any] = []
        while len(text) < 4 or (len(text) < longest and pick(0, 5)):
            words = torch.randint(
                TOKENS.start, TOKENS.stop, (pick(1, 10),), generator=generator
            ).tolist()
            kind = pick(0, 2)
            if at % 3 == 0 and kind == 2:
                name = ("m1", "m2")[pick(0, 1)]
                item = torch.randn(pick(1, 6), WIDTHS[name], generator=generator)
                shared.setdefault(name, []).append(item)
                text.append(ids[name])
                spelled.append(ids[name])
            elif kind == 0 and at % 10 != 1:
                text += words
                spelled.append(ids["spell"])
                bank = banks[(at + len(rows)) % len(banks)] if banks else None
                rows.append(table[words] if bank is None else BankRows(bank, words))
            else:
                text += words
                spelled += words
        text.append(TOKENS.start)  # the last token is text: its logits are compared
        spelled.append(TOKENS.start)
        with_rows = {**shared, **({"spell": rows} if rows else {})}
        pairs.append((_request(text, shared), _request(spelled, with_rows)))
    return pairs


def make_bank(file: Path, checkpoint: Path) -> Path:
    """A bank of modality `spell` whose rows are the tokens' embeddings, by the tokens' ids."""
    source = file.with_suffix(".safetensors")
    save_file({"rows": token_table(checkpoint).contiguous()}, source)
    build_bank(source, file, modality="spell")
    return file


def _request(ids: list[int], items: dict[str, list[Any]]) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": ids}
    return {**request, "multi_modal_data": items} if items else request


@dataclass
class Comparison:
    """How far two lists of answers are from each other.

    Attributes:
        requests: how many were compared.
        equal: how many of them agree bit for bit.
        diverged: how many sampled another token somewhere.
        largest: largest difference of a log-probability, up to the first other token.
    """

    requests: int
    equal: int
    diverged: int
    largest: float


Answer = tuple[list[int], list[dict[int, float]]]
"""Sampled tokens, and at each step the log-probabilities of the best ones."""


def answers_of(outputs: Any) -> list[Answer]:
    """What `compare` needs of vLLM's outputs."""
    answers = []
    for output in outputs:
        sampled = output.outputs[0]
        steps = [{t: e.logprob for t, e in step.items()} for step in sampled.logprobs]
        answers.append((list(sampled.token_ids), steps))
    return answers


def compare(first: list[Answer], second: list[Answer]) -> Comparison:
    """Compare answers to the same requests."""
    equal = diverged = 0
    largest = 0.0
    for (tokens, steps), (other_tokens, other_steps) in zip(first, second, strict=True):
        worst = 0.0
        for at, (token, other) in enumerate(zip(tokens, other_tokens, strict=True)):
            both = steps[at].keys() & other_steps[at].keys()
            worst = max([worst, *(abs(steps[at][t] - other_steps[at][t]) for t in both)])
            if token != other:
                break
        diverged += tokens != other_tokens
        equal += tokens == other_tokens and worst == 0.0
        largest = max(largest, worst)
    return Comparison(len(first), equal, diverged, largest)


def make_lora(path: Path, checkpoint: Path, rank: int = 8, seed: int = 5) -> Path:
    """A random adapter of a checkpoint's attention and MLP, in PEFT's format."""
    import json

    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets += ("in_proj_qkv", "in_proj_z", "out_proj")
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            layer = name.removesuffix(".weight")
            if name.startswith("model.layers.") and layer.rsplit(".", 1)[-1] in targets:
                rows, columns = weight.shape
                full = f"base_model.model.{layer}"
                weights[f"{full}.lora_A.weight"] = 0.1 * torch.randn(
                    rank, columns, generator=generator
                )
                weights[f"{full}.lora_B.weight"] = 0.1 * torch.randn(
                    rows, rank, generator=generator
                )
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(targets), "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
