"""Shapes: the presets against published counts, config.json read and written."""

import json
from dataclasses import replace

import pytest
import transformers

from llamaweft.errors import UserError
from llamaweft.model.presets import PRESETS, LlamaConfig, parameter_count

# As published on the models' pages.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_transformers(tied):
    config = replace(PRESETS["tiny"], vocab_size=300, head_dim=24, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict()))
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_head_dim_defaults_to_an_even_share():
    assert PRESETS["llama3.2-1b"].head_dim == 64
    assert PRESETS["llama3.2-3b"].head_dim == 128
    assert PRESETS["tiny"].head_dim == 16


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json_and_transformers(name, tmp_path):
    config = PRESETS[name]
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())), "here") == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaConfig
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert LlamaConfig.from_dict(theirs.to_dict(), "here") == config


def _old(**changes):
    """A config.json as transformers 4 wrote them."""
    data = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 500000.0,
    }
    return {key: value for key, value in {**data, **changes}.items() if value is not ...}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_old_and_new_rope_keys_mean_the_same():
    plain = LlamaConfig.from_dict(_old(), "here")
    assert (plain.rope_theta, plain.rope_scaling) == (500000.0, None)
    assert plain.num_key_value_heads == 4
    new = {"rope_theta": 500000.0, "rope_type": "default"}
    assert LlamaConfig.from_dict(_old(rope_theta=..., rope_parameters=new), "here") == plain

    scaled = LlamaConfig.from_dict(_old(rope_scaling={"type": "llama3", **LLAMA3}), "here")
    assert scaled.rope_scaling == {"rope_type": "llama3", **LLAMA3}
    new = {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}
    assert LlamaConfig.from_dict(_old(rope_theta=..., rope_parameters=new), "here") == scaled

    linear = LlamaConfig.from_dict(_old(rope_scaling={"type": "linear", "factor": 2}), "here")
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_rope_theta_is_10000_where_old_files_leave_it_out():
    assert LlamaConfig.from_dict(_old(rope_theta=...), "here").rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is missing"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes, says):
    with pytest.raises(UserError) as refused:
        LlamaConfig.from_dict(_old(**changes), "some/config.json")
    assert "some/config.json" in str(refused.value)
    assert says in str(refused.value)
