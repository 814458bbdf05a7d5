"""The grammar of methods, and which settings have an effect."""

import dataclasses
import re

import pytest

from soft_jax.config import DEFAULTS, RUNTIME_FIELDS, Config
from soft_jax.errors import UserError
from soft_jax.experiment import settings as settings_lib
from soft_jax.methods import hosts, registry
from tests.conftest import LAYERS, TINY, names

METHODS = (
    *("head", "ft", "ewc", "lwf", "derpp", "icarl", "bic", "softtf", "lora", "adapter"),
    *("dualprompt", "dualprompt+pgp", "dualprompt+softtf", "dualprompt+pgp+softtf"),
    *("dualprompt+wsn", "dualprompt+softnet", "l2p", "l2p+pgp", "l2p+pgp+softtf"),
)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_one_spelling(method):
    """In whatever order its parts are named; the run's identity has the one."""
    backwards = "+".join(reversed(method.split("+")))
    assert registry.parse(backwards) == registry.parse(method)
    assert registry.parse(backwards).name == method
    assert settings_lib.used_settings(Config(method=backwards))["method"] == method


def test_the_parts_of_a_method():
    parts = registry.parse("softtf+pgp+dualprompt")
    assert (parts.host_name, parts.strategy_name) == ("dualprompt", "pgp")
    assert parts.reparametrization_name == "softtf"
    assert not parts.whole_network
    trained = {method for method in METHODS if registry.parse(method).whole_network}
    assert trained == {"ft", "ewc", "lwf", "derpp", "icarl", "bic"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "coda"},
            "method: 'coda' is unknown; known are adapter, bic, clip, clipprompt, derpp, "
            "dualprompt, ewc, ft, head, icarl, l2p, lora, lwf",
        ),
        (
            {"method": "ft+pgp"},
            "method: 'ft+pgp': head, ft, ewc, lwf, derpp, icarl, bic stand alone",
        ),
        ({"method": "lora+lora"}, "a part is named once"),
        ({"method": "dualprompt+softtf+lora"}, "names both softtf and lora; one of them at most"),
        ({"method": "pgp+softtf"}, "pgp projects prompts, so it needs one of dualprompt, l2p"),
        (
            {"mask_storage": "int3"},
            "mask_storage: 'int3' is unknown; did you mean 'int8'? known are float32, int8, int4",
        ),
        ({"mask_init": "zeros"}, "mask_init: 'zeros' is unknown"),
        (
            {"mask_towers": "vision+vision"},
            "mask_towers: 'vision+vision' is unknown; did you mean 'vision'? known are vision,",
        ),
        ({"method": "dualpromt+softtf"}, "'dualpromt' is unknown; did you mean 'dualprompt'? k"),
        ({"method": "dualprompt+sofftf"}, "'sofftf' is unknown; did you mean 'softtf'? known are"),
        ({"mask_init": "uniforn"}, "'uniforn' is unknown; did you mean 'uniform'? known are"),
        ({"prefix_layout": "seperate"}, "did you mean 'separate'? known are separate, inter"),
        ({"scenario": "increment"}, "did you mean 'increments'? known are equal, increments, file"),
        ({"prefix_layout": "x"}, "prefix_layout: 'x' is unknown"),
        ({"top_k": 11, "method": "l2p"}, "top_k: 11 is above pool_size, 10"),
        ({"g_prompt_layers": (9, 10)}, "both name layer 10; a layer takes one prompt"),
        ({"scenario": "random"}, "scenario: 'random' is unknown; known are equal, increments"),
        ({"scenario": "file"}, "scenario_file: scenario 'file' needs the file"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        settings_lib.check(Config(**settings))


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("head", "density", 0.5),
        ("dualprompt+softtf", "rank", 8),
        ("dualprompt+lora", "mask_init", "ones"),
        ("dualprompt+wsn", "mask_storage", "int8"),
        ("ft", "shots", (3,)),
        ("dualprompt", "shots", (3,)),
        ("adapter", "shots", (3,)),
        ("ft", "cache_queries", True),
        ("ewc", "lwf_strength", 2.0),
        ("softtf", "g_prompt_length", 7),
        ("dualprompt+softtf", "increment", 20),
        ("dualprompt+softtf", "buffer_size", 300),
    ],
)
def test_a_setting_without_effect_is_refused_by_name(method, setting, value):
    """And is no part of what the run is."""
    default = DEFAULTS[setting]
    with pytest.raises(UserError, match=rf"^{setting}: .* has no effect with .*; leave it at"):
        settings_lib.check(Config(method=method, **{setting: value}))
    settings_lib.check(Config(method=method, **{setting: default}))
    assert setting not in settings_lib.used_settings(Config(method=method))
    assert settings_lib.drop_unused({"method": method, setting: value}) == {"method": method}


def test_rank_is_used_where_masks_are_products():
    settings_lib.check(Config(rank=8, mask_storage="lowrank"))
    assert "rank" in settings_lib.used_settings(Config(mask_storage="lowrank"))


def test_layers_at_once_may_be_one_layer_too_many():
    """`layers` in a config's argument sets both; the one without effect is as the other."""
    both = {"mask_layers": (3, 4), "e_prompt_layers": (3, 4)}
    settings_lib.check(Config(method="softtf", **both))
    with pytest.raises(UserError, match="e_prompt_layers"):
        settings_lib.check(Config(method="softtf", **both | {"e_prompt_layers": (5,)}))


def test_every_setting_is_used_by_some_run():
    used = set()
    for method in (*METHODS, "clip", "softtf"):
        for scenario, towers in (("equal", "vision"), ("increments", "vision+text")):
            config = Config(method=method, scenario=scenario, mask_towers=towers)
            used |= settings_lib.used_settings(config).keys()
    fields = {field.name for field in dataclasses.fields(Config)}
    assert used == fields - set(RUNTIME_FIELDS)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_made(method):
    settings = settings_lib.drop_unused({"method": method, **LAYERS})
    made = registry.make_method(Config(**settings), TINY, names(6))
    parts = registry.parse(method)
    assert isinstance(made.host, parts.host)
    assert (made.strategy is None) == (parts.strategy is None)
    assert (made.reparametrization is None) == (parts.reparametrization is None)
    assert made.trains_backbone == parts.whole_network
    assert made.num_classes == 6
    hash(made)  # jit takes it as static


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_layers": (5,)}, "mask_layers: layer 5 is not one of vit_b16's layers 1 to 4"),
        ({"e_prompt_layers": (9,)}, "e_prompt_layers: layer 9 is not one of"),
        ({"g_prompt_layers": (5,)}, "g_prompt_layers: layer 5 is not one of"),
        ({"target_modules": "qkv+ffn"}, "'ffn' is unknown; known are qkv, qv, proj, mlp, joined"),
        ({"target_modules": "qvk"}, "'qvk' is unknown; did you mean 'qv'? known are qkv, qv,"),
        ({"target_modules": "qkv+qkv"}, "names weights twice"),
        ({"target_modules": "qv"}, "target_modules: 'qv' is for lora"),
        (
            {"target_modules": "qkv+qv", "method": "lora"},
            "target_modules: 'qkv+qv' names weights twice",
        ),
        ({"method": "lora", "rank": 25}, "rank: 25 is above the backbone's width, 24"),
        ({"method": "adapter", "rank": 25}, "rank: 25 is above the backbone's width, 24"),
        ({"mask_storage": "lowrank", "rank": 25}, "rank: 25 is above the backbone's width, 24"),
    ],
)
def test_what_the_backbone_does_not_have_is_named(settings, message):
    config = Config(**settings_lib.drop_unused({**LAYERS, **settings}))
    with pytest.raises(UserError, match=re.escape(message)):
        registry.make_method(config, TINY, names(6))


def test_settings_reach_the_method():
    """Layers, counted from 1 in settings, count from 0 in methods, in order."""
    settings = {"mask_layers": (4,), "target_modules": "qkv+mlp", "mask_init": "ones"}
    prompts = {
        "e_prompt_layers": (4, 3),
        "g_prompt_layers": (1,),
        "prefix_layout": "interleaved",
    }
    made = registry.make_method(Config(**settings, **prompts), TINY, names(6))
    assert made.kernels == (
        "blocks_3/attn/qkv/kernel",
        "blocks_3/mlp/fc1/kernel",
        "blocks_3/mlp/fc2/kernel",
    )
    assert (made.reparametrization.init_as, made.first_task_layer) == ("ones", 2)
    assert made.host == hosts.DualPrompt((2, 3), 5, (0,), 5, "interleaved")
    plain = registry.make_method(Config(method="dualprompt", **prompts), TINY, names(6))
    assert plain.kernels == ()
    pool = Config(method="l2p", pool_size=7, e_prompt_length=2, top_k=3)
    assert registry.make_method(pool, TINY, names(6)).host == hosts.L2P(7, 2, 3)


def test_lora_of_q_and_v_alone():
    """The kernels that hold q, k and v are told from the others, whose columns are one block."""
    config = Config(method="lora", target_modules="qv+proj", mask_layers=(4,), rank=3)
    lora = registry.make_method(config, TINY, names(6)).reparametrization
    assert lora.kernels == ("blocks_3/attn/qkv/kernel", "blocks_3/attn/proj/kernel")
    assert (lora.fused, lora.parts, lora.rank) == (lora.kernels[:1], (0, 2), 3)
    whole = dataclasses.replace(config, target_modules="qkv+proj")
    assert registry.make_method(whole, TINY, names(6)).reparametrization.parts == (0, 1, 2)


def test_a_rank_that_is_not_used_is_not_checked():
    """What the store does with masks in steps has no rank."""
    config = Config(mask_storage="int8", rank=193, **LAYERS)
    assert registry.make_method(config, TINY, names(6)).kernels
