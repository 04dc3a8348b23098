"""Settings that change the bytes of KV and that tiny models cannot run with on a CPU: each has its fingerprint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_support import make_adapter
from tiny_model import make_tiny_model
from transformers import PretrainedConfig

from kvortex.vllm.identity.files import weights_digest
from kvortex.vllm.identity.identity import facts_of, source_of

INPUTS: dict[str, Any] = {
    "mm_processor_kwargs": None,
    "media_io_kwargs": {},
    "video_pruning_rate": None,
    "mm_encoder_attn_dtype": None,
    "mm_processor_cache_gb": 4,
    "limit_per_prompt": {},
}


def facts(cache_dtype: str = "auto", **model: Any) -> dict[str, Any]:
    settings = {"hf_config": PretrainedConfig(), "dtype": torch.float16, "quantization": None, "max_model_len": 8}
    return facts_of(
        SimpleNamespace(
            model_config=SimpleNamespace(**settings | model),
            cache_config=SimpleNamespace(cache_dtype=cache_dtype),
            compilation_config=SimpleNamespace(static_forward_context={}),
            speculative_config=None,
            device_config=SimpleNamespace(device_type="cuda"),
        )  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"mm_processor_kwargs": {"num_crops": 4}},
        {"media_io_kwargs": {"video": {"num_frames": 40}}},
        {"video_pruning_rate": 0.5},
        {"mm_encoder_attn_dtype": "fp8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_how_images_become_embeddings_is_named(change: dict[str, Any]) -> None:
    assert facts(multimodal_config=SimpleNamespace(**INPUTS | change)) != facts(
        multimodal_config=SimpleNamespace(**INPUTS)
    )


@pytest.mark.parametrize("change", [{"mm_processor_cache_gb": 0}, {"limit_per_prompt": {"image": 2}}], ids=str)
def test_what_only_costs_time_or_room_is_not_named(change: dict[str, Any]) -> None:
    assert facts(multimodal_config=SimpleNamespace(**INPUTS | change)) == facts(
        multimodal_config=SimpleNamespace(**INPUTS)
    )


@pytest.mark.parametrize(("one", "other"), [("auto", "float16"), ("fp8", "fp8_e4m3")])
def test_two_names_of_one_cache_dtype_are_one(one: str, other: str) -> None:
    assert facts(cache_dtype=one) == facts(cache_dtype=other) != facts(cache_dtype="fp8_e5m2")


def test_which_layers_are_quantised_on_loading_is_named() -> None:
    first, second = ({"linear": "fp8_per_tensor", "ignore": [name]} for name in ("q_proj", "k_proj"))
    assert facts(quantization_config=first) != facts(quantization_config=second) != facts()
    assert facts(quantization_config=first) == facts(quantization_config=dict(first))


def test_another_class_for_the_same_architecture_is_named() -> None:
    assert facts(model_class_overrides={"Qwen3ForCausalLM": "mine:Model"}) != facts(model_class_overrides={})


def test_a_configuration_from_elsewhere_says_nothing_of_the_weights() -> None:
    config, load = SimpleNamespace(_commit_hash="1234"), SimpleNamespace(load_format="auto")
    model = SimpleNamespace(model="owner/name", revision=None, hf_config=config, hf_config_path=None, seed=0)
    assert source_of(model, load).content == "1234"
    model.hf_config_path = "owner/other"
    assert source_of(model, load).content == ""


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "processor_config.json", "hf_quant_config.json", "modeling_own.py"]
)
def test_files_beside_the_weights_count(tmp_path: Path, name: str) -> None:
    model = make_tiny_model(tmp_path, "qwen3")
    before = weights_digest(model)
    (model / name).write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert weights_digest(model) != before
    (model / "model.safetensors").unlink()
    assert weights_digest(model) == ""


def test_an_adapters_scale_counts(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3")
    adapter = make_adapter(tmp_path / "adapter", model, seed=1)
    before = weights_digest(adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    assert weights_digest(adapter) != before
