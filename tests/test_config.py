import importlib.util
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from soft_jax.config import (
    DEFAULTS,
    SIZES,
    Config,
    check_flag,
    config_dict,
    from_config_dict,
    from_settings,
    parse_argument,
)
from soft_jax.errors import UserError
from soft_jax.experiment import settings as settings_lib

CONFIGS = Path(__file__).parent.parent / "configs"


def get_config(name, argument=None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(argument))


def test_the_papers_settings():
    """Settings table and Table 7's row L[10,11,12] q,k,v,proj."""
    c = get_config("vit_cil")
    assert (c.dataset, c.tasks, c.epochs, c.batch_size, c.learning_rate, c.seed) == (
        "cifar100",
        10,
        20,
        24,
        0.03,
        59,
    )
    assert (c.backbone, c.image_size, c.method, c.clip_norm, c.key_loss_weight) == (
        "vit_b16",
        0,
        "dualprompt+softtf",
        1.0,
        1.0,
    )
    assert (c.mask_layers, c.target_modules, c.mask_init) == ((10, 11, 12), "qkv+proj", "uniform")
    assert (c.e_prompt_layers, c.e_prompt_length, c.g_prompt_layers, c.g_prompt_length) == (
        (10, 11, 12),
        5,
        (1, 2),
        5,
    )
    assert (c.crop_scale, c.crop_ratio, c.flip, c.prefix_layout) == (
        (0.05, 1.0),
        (0.75, 4 / 3),
        True,
        "separate",
    )
    assert c.benchmark == "c100_10"


def test_layers_of_prompts_that_a_method_does_not_have():
    for method in ("softtf", "l2p+softtf", "adapter"):
        assert get_config("vit_cil", f"method={method},layers=1-12").mask_layers == tuple(
            range(1, 13)
        )


def test_variants():
    c = get_config("vit_cil", "tasks=20,method=dualprompt,layers=3-5")
    assert (c.tasks, c.seed, c.method, c.mask_layers, c.e_prompt_layers) == (
        20,
        42,
        "dualprompt",
        (3, 4, 5),
        (3, 4, 5),
    )
    assert get_config("vit_cil", "tasks=20,seed=7").seed == 7
    assert get_config("vit_cil", "layers=3+5+7-9").mask_layers == (3, 5, 7, 8, 9)
    assert get_config("vit_cil", "learning_rate=1,flip=false,crop_scale=0.5-1").crop_scale == (
        0.5,
        1.0,
    )
    assert get_config("digits").dataset == "digits"
    other_order = get_config("digits", "method=softtf+dualprompt")
    assert other_order.mask_layers == get_config("digits").mask_layers


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("digits", "scenario=file,scenario_file=t.json"),
        ("digits", "scenario=increments"),
        ("digits", "mask_towers=text,text_mask_layers=3"),
        ("library", "method=adapter"),
        ("library", "method=dualprompt"),
    ],
)
def test_a_config_sets_nothing_that_a_choice_of_the_users_leaves_without_effect(name, argument):
    config, given = get_config(name, argument), parse_argument(argument)
    settings_lib.check(config)
    assert {key: getattr(config, key) for key in given} == given
    with pytest.raises(UserError, match="tasks: 5 has no effect with scenario 'file'"):
        settings_lib.check(get_config(name, "scenario=file,scenario_file=t.json,tasks=5"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("taks=20", "key 'taks' is unknown; did you mean 'tasks'?"),
        ("tasks=3,tasks=4", "tasks is given twice"),
        ("layers=3,mask_layers=4", "mask_layers is given twice"),
        *(
            (f"{key}=3+1-{last}", f"{key}='3.1-{last}' is more than 10,000 numbers, the most of")
            for key in ("layers", "shots")
            for last in (10_000, 99999999, 9999999999999999999)
        ),
        ("tasks=ten", "tasks='ten' is not of the type int"),
        (
            "layers=12-10",
            "layers='12-10' has the range '12-10', which goes backwards; write the sm",
        ),
        (f"shots=9+{10**30}-0", "has the range '10+-0', which goes backwards"),
        ("crop_scale=0.5", "crop_scale='0.5' is not a range"),
        ("tasks=2.5", "tasks='2.5' is not of the type int"),
        ("flip=2", "flip='2' is not of the type bool"),
        ("layers=a-b", "layers='a-b' is not one or more whole numbers, such as 10-12"),
        ("tasks", "'tasks': write key=value"),
        ("epochs=1e1", "epochs='1e1' is not of the type int, a whole number such as 10"),
        ("learning_rate=fast", "learning_rate='fast' is not of the type float, a number such as"),
        *(
            (f"{field}={'-' * 5000}1", rf"^config argument: {field}='-{{70,80}}\.\.\. is not .*$")
            for field in ("tasks", "layers", "shots", "flip", "learning_rate", "crop_scale")
        ),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(UserError, match=message):
        parse_argument(argument)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density: 0.0 is not a share above 0"),
        ({"rank": 0}, "rank: 0 is below 1"),
        ({"dtype": "float16"}, "'float16' is unknown; did you mean 'bfloat16'. known are float32"),
        (
            {"optimizer": "adan"},
            "optimizer: 'adan' is unknown; did you mean 'adam'. known are adam",
        ),
        ({"schedule": "cosin"}, "did you mean 'cosine'. known are constant, cosine"),
        ({"tasks": 0}, "tasks: 0 is below 1"),
        ({"tasks": True}, "tasks: True is not of the type int"),
        ({"seed": 2**31}, "seed: 2147483648 is not below"),
        ({"buffer_size": 10**20}, "buffer_size: 100000000000000000000 is not below"),
        ({"prototype_features": 2**31}, "prototype_features: 2147483648 is not below"),
        ({"shots": (7, 10**20)}, "shots: 100000000000000000000 is not below"),
        ({"e_prompt_length": 0}, "e_prompt_length: 0 is below 1"),
        *(
            ({name: (8, 7, 7)}, rf"{name}: \(8, 7, 7\) names 7 twice")
            for name, value in DEFAULTS.items()
            if isinstance(value, tuple) and type(value[0]) is int
        ),
        *(({name: 2**31 - 1}, f"^{name}: 2147483647 is above .*, the most") for name in SIZES),
        *(
            ({name: 1e39}, rf"{name}: 1e\+39 is not finite in float32")
            for name, value in DEFAULTS.items()
            if type(value) is float
        ),
        ({"image_size": 100_000}, "image_size: 100000 is above 4096, the most that is taken"),
        ({"crop_ratio": (1e-30, 1)}, "crop_ratio: .* reaches beyond 1/64 to 64, the thinnest"),
        ({"crop_ratio": (1, 65)}, r"crop_ratio: \(1, 65\) reaches beyond 1/64 to 64"),
        ({"mask_layers": ()}, r"mask_layers: \(\) is not one or more whole numbers"),
        ({"mask_layers": (10.0,)}, r"mask_layers: \(10.0,\) is not one or more whole numbers"),
        ({"e_prompt_layers": "abc"}, "e_prompt_layers: 'abc' is not one or more whole numbers"),
        ({"crop_ratio": (1.0,)}, r"crop_ratio: \(1.0,\) is not a range"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is below"),
        ({"learning_rate": float("inf")}, "learning_rate: inf is not finite"),
        ({"crop_scale": (0.5, 2.0)}, r"crop_scale: \(0.5, 2.0\) reaches above 1"),
        ({"validation": 1.0}, "validation: 1.0 is not a share from 0 to below 1"),
        ({"crop_scale": (2, 5)}, r"crop_scale: \(2, 5\) reaches above 1"),
        ({"clip_norm": float("inf")}, "clip_norm: inf is not finite"),
        ({"learning_rate": float("1e400")}, "learning_rate: inf is not finite"),
        ({"learning_rate": 10**400}, r"learning_rate: 1000.*\.\.\. is not finite"),
        ({"crop_ratio": (1, float("nan"))}, r"crop_ratio: \(1, nan\) is not finite"),
        ({"seed": 10**5000}, "seed: a number of thousands of digits is not finite"),
        ({"shots": (0.5,)}, r"shots: \(0.5,\) is not one or more whole numbers"),
        ({"crop_scale": (1.0, 0.5)}, r"crop_scale: \(1.0, 0.5\) is not a range"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rate=1e400", "learning_rate: inf is not finite"),
        ("clip_norm=inf", "clip_norm: inf is not finite"),
        ("crop_scale=2-5", r"crop_scale: \(2.0, 5.0\) reaches above 1"),
    ],
)
def test_values_out_of_range_by_argument(argument, message):
    settings = parse_argument(argument)
    with pytest.raises(UserError, match=message):
        from_settings(settings)


def test_layers_that_a_stored_run_names_twice_are_read_once():
    assert from_settings({"mask_layers": [4, 3, 3], "crop_scale": [1.0, 1.0]}) == Config(
        mask_layers=(4, 3), crop_scale=(1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("mask_layers", text) for text in ("10", "10,11", "(10, 11)", "[10,11]", "(10,)")),
        ("crop_scale", "0.05,1"),
        ("crop_scale", "(2,5)"),  # its range is for `Config`
        ("epochs", "10"),
        ("seed", "0x10"),
        ("learning_rate", "1e-3"),
        ("learning_rate", "1e400"),
        ("flip", "true"),
        ("flip", "F"),
        ("dataset", "1e1"),
    ],
)
def test_flags_that_can_be_read(name, text):
    """What is let through here, ml_collections reads."""
    check_flag(name, text)
    config, left = flags_of(name, text)
    assert not left
    assert type(config[name]) is type(Config.__dataclass_fields__[name].default)


def flags_of(name, text):
    """Return what ml_collections makes of a flag, as the command reads it."""
    argv = ["train", f"--config.{name}={text}"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config_dict(), sys_argv=argv, flag_values=values)
    left = values(argv)[1:]
    return values.config, left


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epochs", "1e1", "^epochs: '1e1' is not of the type int, a whole number such as 10$"),
        (
            "mask_layers",
            "10-12",
            r"^mask_layers: '10-12' is not one or more whole numbers, such as .* 3,5\)$",
        ),
        ("mask_layers", "()", "one or more whole numbers"),
        ("shots", "0-9999999999999999999", "shots: '0-9+' is more than 10,000 numbers, the most"),
        (
            "mask_layers",
            "12-10",
            "mask_layers: '12-10' has the range '12-10', which goes backwards",
        ),
        ("crop_scale", "0.05-1", r"'0.05-1' is not a range, such as .*0.05,1\)"),
        ("flip", "maybe", "flip: 'maybe' is not of the type bool, true or false"),
        ("learning_rate", "fast", "a number such as 0.03 or 3e-2"),
        *((name, "-" * 5000 + "1", r"'-{70,80}\.\.\. is not") for name in ("epochs", "shots")),
        *((name, "-" * 5000 + "1", r"'-{70,80}\.\.\. is not") for name in ("flip", "clip_norm")),
    ],
)
def test_flags_that_can_not_be_read_say_how_they_are_written(name, text, message):
    with pytest.raises(UserError, match=message):
        check_flag(name, text)


def test_the_bounds_themselves_are_taken():
    assert parse_argument("shots=0-9999") == {"shots": tuple(range(10_000))}
    Config(image_size=4096, prototype_features=2**14, buffer_size=2**20, crop_ratio=(1 / 64, 64))


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="setting 'epoch' is unknown; did you mean 'epochs'?"):
        from_settings({"epoch": 3})


def test_round_trip():
    c = Config(mask_layers=(3, 4), tasks=5)
    assert from_config_dict(config_dict(mask_layers=(3, 4), tasks=5)) == c
