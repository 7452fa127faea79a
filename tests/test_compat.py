"""What we lean on in vLLM, by name: a release that moves one of them is noticed here first."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict, Field

pytest.importorskip("vllm")

from mmqwen.vllm_plugin import compat

NAMES = {
    "vllm": ["LLM", "ModelRegistry", "SamplingParams", "plugins.load_endpoint_plugins"],
    "vllm.config": ["VllmConfig"],
    "vllm.distributed": [
        "get_pp_group", "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size",
        "tensor_model_parallel_all_reduce",
    ],
    "vllm.entrypoints.cli.serve": [
        "ServeSubcommand.subparser_init", "ServeSubcommand.validate", "ServeSubcommand.cmd",
    ],
    "vllm.entrypoints.serve.utils.api_utils": ["validate_json_request"],
    "vllm.inputs": ["mm_input", "TextPrompt", "TokensPrompt", "EmbedsPrompt"],
    "vllm.logger": ["init_logger"],
    "vllm.model_executor.layers.vocab_parallel_embedding": ["VocabParallelEmbedding"],
    "vllm.model_executor.models.config": [
        "MODELS_CONFIG_MAP", "VerifyAndUpdateConfig.verify_and_update_config",
    ],
    "vllm.model_executor.models.interfaces": [
        "SupportsLoRA", "SupportsMultiModal._mark_language_model", "SupportsPP",
    ],
    "vllm.model_executor.models.module_mapping": ["MultiModelKeys.from_string_field"],
    "vllm.model_executor.models.utils": [
        "AutoWeightsLoader.load_weights", "WeightsMapper", "init_vllm_registered_model",
        "maybe_prefix",
    ],
    "vllm.multimodal": ["MULTIMODAL_REGISTRY"],
    "vllm.multimodal.inputs": [
        "MultiModalFieldConfig.batched", "MultiModalFieldElem", "MultiModalKwargsItem",
        "MultiModalKwargsItems", "PlaceholderRange",
    ],
    "vllm.multimodal.parse": [
        "ModalityDataItems", "MultiModalDataItems", "MultiModalDataParser.parse_mm_data",
    ],
    "vllm.multimodal.processing": [
        "BaseDummyInputsBuilder.get_dummy_text", "BaseMultiModalProcessor.apply",
        "BaseProcessingInfo.get_supported_mm_limits",
        "BaseProcessingInfo.get_mm_max_tokens_per_item",
    ],
    "vllm.platforms": ["current_platform"],
    "vllm.renderers.hf": ["HfRenderer"],
    "vllm.renderers.registry": ["RENDERER_REGISTRY.renderers"],
    "vllm.utils.argparse_utils": ["FlexibleArgumentParser"],
}  # fmt: skip
"""Module -> names in it, all found in the sources of 0.26.0, 0.28.0, 0.32.0 and 0.33.0."""

OVERRIDES = {
    "render_messages": ["messages", "params"],
    "render_messages_async": ["messages", "params"],
    "render_prompts": ["prompts"],
    "render_prompts_async": ["prompts"],
    "_process_embeds": ["prompt"],
    "_process_tokens": ["prompt"],
    "_process_tokens_async": ["prompt"],
    "_process_multimodal": ["prompt", "mm_data"],
}
"""Methods of vLLM's renderer that ours overrides -> the arguments that ours names."""


@pytest.mark.parametrize("module", NAMES)
def test_what_we_import_is_there(module):
    found = importlib.import_module(module)
    for name in NAMES[module]:
        value = found
        for step in name.split("."):
            assert hasattr(value, step), f"{module}.{name}"
            value = getattr(value, step)


@pytest.mark.parametrize("method", OVERRIDES)
def test_what_we_override_takes_the_same_arguments(method):
    from vllm.renderers.hf import HfRenderer

    names = list(inspect.signature(getattr(HfRenderer, method)).parameters)[1:]
    assert names[: len(OVERRIDES[method])] == OVERRIDES[method]


def test_engine_options_that_we_read_are_there():
    from vllm.config import ModelConfig, MultiModalConfig, VllmConfig

    for kind, fields in {
        VllmConfig: ["ec_transfer_config", "speculative_config", "kv_transfer_config"],
        ModelConfig: ["tokenizer_mode", "multimodal_config"],
        MultiModalConfig: ["mm_encoder_only", "mm_processor_cache_gb"],
    }.items():
        for field in fields:
            assert field in kind.__dataclass_fields__, f"{kind.__name__}.{field}"


@pytest.mark.parametrize("place", range(len(compat.CLI_ENV_SETUP)))
def test_cli_env_setup_is_taken_from_where_it_is(monkeypatch, place):
    """0.33 moved it; in the other place there is then no module, or a module without it."""
    called = []
    for at, name in enumerate(compat.CLI_ENV_SETUP):
        module = ModuleType(name)
        if at == place:
            module.cli_env_setup = lambda name=name: called.append(name)
            monkeypatch.setitem(sys.modules, name, module)
        else:
            monkeypatch.setitem(sys.modules, name, None if place else module)
    compat._attribute("cli_env_setup", *compat.CLI_ENV_SETUP)()
    assert len(called) == 1


def test_a_name_that_is_nowhere_is_an_import_error():
    with pytest.raises(ImportError, match=r"no nothing_of_the_kind in any of \['vllm.logger'\]"):
        compat._attribute("nothing_of_the_kind", "vllm.logger")


@pytest.mark.parametrize(
    ("device", "hybrid", "reads_others", "dtype", "settled"),
    [
        ("cpu", True, False, "auto", "float32"),
        ("cpu", True, False, "bfloat16", "float32"),
        ("cpu", True, True, "bfloat16", "bfloat16"),
        ("cpu", False, False, "auto", "auto"),
        ("cuda", True, False, "auto", "auto"),
    ],
)
def test_recurrent_states_are_what_the_cpu_kernel_reads(
    monkeypatch, device, hybrid, reads_others, dtype, settled
):
    """Before 0.29 float32 alone, whatever the model's dtype: each request of a hybrid failed."""
    from mmqwen.vllm_plugin.compat import text_model

    platform = ModuleType("vllm.platforms.cpu")
    if reads_others:
        platform._cpu_mamba_backend = None
    monkeypatch.setitem(sys.modules, "vllm.platforms.cpu", platform)
    monkeypatch.setattr(text_model, "current_platform", SimpleNamespace(device_type=device))
    warned = []
    monkeypatch.setattr(text_model.logger, "warning", lambda *said: warned.append(said))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(mamba_ssm_cache_dtype=dtype),
        model_config=SimpleNamespace(is_hybrid=hybrid),
    )
    text_model.settle_recurrent_states(config)
    assert config.cache_config.mamba_ssm_cache_dtype == settled
    assert len(warned) == (dtype not in ("auto", settled))


def test_the_door_is_put_into_servers_of_our_models_alone():
    """Whatever `VLLM_PLUGINS` says, and once, however often the plugin is registered."""
    import vllm.plugins

    from mmqwen.vllm_plugin import register
    from mmqwen.vllm_plugin.door import Door

    register()
    register()
    doors = [
        entry for entry in vllm.plugins.load_endpoint_plugins(("generate",)) if type(entry) is Door
    ]
    assert len(doors) == 1


class Asked(BaseModel):
    """A request that takes further fields and skips them, as vLLM's do."""

    model_config = ConfigDict(extra="allow")
    prompt: str = ""
    items: list[str] = Field(default_factory=list)


@pytest.mark.parametrize("ours", [True, False])
def test_the_door_refuses_what_a_route_does_not_declare(monkeypatch, ours):
    import asyncio

    from fastapi import Depends, FastAPI
    from fastapi.testclient import TestClient

    from mmqwen.modalities import ModalitySpec
    from mmqwen.vllm_plugin import door

    check = compat.json_request_check()
    app = FastAPI()

    @app.post("/ask", dependencies=[Depends(check)])
    async def ask(request: Asked) -> str:
        return request.prompt

    specs = {
        name: ModalitySpec(name=name, dim=4, token=f"<|{name}|>", token_id=9 + at)
        for at, name in enumerate(("m1", "items", "user"))
    }
    monkeypatch.setattr(door, "is_ours", lambda config: ours)
    monkeypatch.setattr(door, "modality_table", lambda config: specs)
    guard = door.Door()
    guard.attach_router(app)
    asyncio.run(guard.init_state(SimpleNamespace(model_config=object()), app.state, None))
    client = TestClient(app)

    def status(**fields):
        return client.post("/ask", json={"prompt": "hi", **fields}).status_code

    refused = 400 if ours else 200
    assert status(multi_modal_data={"m1": [[1.0]]}) == refused
    assert status(m1_embeds={"data": ""}) == refused
    assert status(user=[[1.0]]) == refused
    assert status(items=["a field of the route's own"]) == 200
    assert status(user="somebody") == status(label=5) == status(multi_modal_data=None) == 200
    assert client.post("/ask", content=b"{", headers={"content-type": "application/json"}).is_error


@pytest.mark.parametrize("name", compat.BATCH_RUNNERS)
def test_lines_of_a_batch_are_looked_at_wherever_the_runner_is(monkeypatch, name):
    import asyncio

    async def run_request(handler, request, *tracker):
        try:
            return await handler(request.body), tracker
        except ValueError as error:
            return str(error), tracker

    module = SimpleNamespace(run_request=run_request, BatchRequestInput=object)
    for other in compat.BATCH_RUNNERS:
        monkeypatch.setitem(sys.modules, other, module if other == name else None)
    compat.guard_batch(lambda line: None)
    compat.guard_batch(lambda line: ValueError("no rows here") if line.body == "bad" else None)

    async def handler(body):
        return f"answer to {body}"

    def ask(body, *tracker):
        return asyncio.run(module.run_request(handler, SimpleNamespace(body=body), *tracker))

    assert ask("good") == ("answer to good", ())
    assert ask("bad", 1) == ("no rows here", (1,))


@pytest.mark.filterwarnings("ignore:The `python -m vllm:DeprecationWarning")
def test_this_vllm_answers_a_batch_where_it_is_looked_for():
    modules = []
    for name in compat.BATCH_RUNNERS[:2]:
        with contextlib.suppress(ModuleNotFoundError):
            modules.append(importlib.import_module(name))
    assert any(
        hasattr(module, "run_request") and hasattr(module, "BatchRequestInput")
        for module in modules
    )


def test_register_is_light_and_reentrant_in_a_fresh_process():
    """Engines and workers register too: no model, no server and no HTTP there."""
    code = (
        "import sys; from mmqwen.vllm_plugin import ARCHITECTURE, register\n"
        "register(); register()\n"
        "print(sorted(name for name in sys.modules if name.startswith(('fastapi', 'uvicorn')) "
        "or name in ('mmqwen.vllm_plugin.door', 'mmqwen.vllm_plugin.model')))\n"
        "from vllm import ModelRegistry as R; assert ARCHITECTURE in R.get_supported_archs()\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('multimodal_qwen3').model_type == 'multimodal_qwen3'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert "already registered" not in done.stderr
