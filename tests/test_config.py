import dataclasses
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

import fastadvisor
from fastadvisor import recipes
from fastadvisor.cli import parse_config
from fastadvisor.config import (
    ESSENTIAL,
    CheckConfig,
    CompareConfig,
    Config,
    Only,
    Positive,
    add_method_settings,
    answer_near_miss,
    build_config,
    list_settings,
    methods_that_use,
    read_layer,
    register_method,
    registered_methods,
    registry,
    resolve,
    select_settings,
    to_dict,
    validate,
)
from fastadvisor.config.near_misses import ANSWERS, OTHER_NAMES
from fastadvisor.errors import UserError, suggest
from fastadvisor.methods import METHODS


@pytest.fixture
def layer(tmp_path):
    """Return a function that writes a YAML file and returns its path."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_layers_defaults_then_recipe_then_file_then_keywords(layer):
    assert Config().epochs == 200
    assert (resolve(Config).epochs, resolve(Config).model) == (100, "resnet8")
    path = layer("epochs: 5\nlr: 0.5\n")
    got = resolve(Config, path, lr=0.25)
    assert (got.epochs, got.lr, got.model) == (5, 0.25, "resnet8")


def test_the_data_set_of_the_file_or_keyword_chooses_the_recipe(layer):
    path = layer("dataset: cifar10\n")
    assert (resolve(Config, path).meta_per_class, resolve(Config, path).epochs) == (100, 200)
    assert resolve(Config, path, dataset="digits").model == "resnet8"


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("kind", [Config, CompareConfig])
def test_every_recipe_resolves_and_says_what_it_is(kind, name):
    text = recipes.read(name)
    got = resolve(kind, name)
    assert isinstance(got, kind)
    assert text.startswith("# ")
    for key, value in yaml.safe_load(text).items():
        assert to_dict(got)[key] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nois_rate: 0.4\n", "Unknown key 'nois_rate' in .*Did you mean 'noise_rate'"),
        ("noise-rate: 0.4\n", "Unknown key 'noise-rate' in .*Did you mean 'noise_rate'"),
        ("1: 0.4\n", "Unknown key '1'"),
        ("noise: [flip\n", "is not readable as YAML: while parsing"),
        ("- epochs\n", "must hold lines of 'key: value'"),
        ("epochs\n", "must hold lines of 'key: value'"),
        (b"\xff\xfe\x00 epochs", "cannot be read as text"),
        ("noise_rate: 1.5\n", r"noise_rate = 1.5 \(from .*: input should be less than or equal to 1\."),
        ("imbalance_factor: 0.5\n", "imbalance_factor = 0.5 .*greater than or equal to 1"),
        ("imbalance_factor: .inf\n", "imbalance_factor = inf .*finite number"),
        ("lr: .nan\n", "lr = nan"),
        ("weight_decay: .inf\n", "weight_decay = inf .*finite number"),
        ("epochs: 2.5\n", "epochs = 2.5 .*valid integer"),
        ("epochs: many\n", "epochs = 'many' .*valid integer"),
        ("amp: perhaps\n", "amp = 'perhaps' .*valid boolean"),
        ("milestones: [0.5, 2]\n", r"milestones = \[0.5, 2\].*less than or equal to 1"),
        ("momentum: 1\n", "momentum = 1 .*less than 1"),
        ("noise: semantik\n", "noise = 'semantik' .*'none', 'flip'.*Did you mean 'semantic'"),
        ("dataset: [digits]\n", r"dataset = \['digits'\] .*input should be 'digits'"),
        ("output: 5\n", "output = 5 .*valid string"),
    ],
)
def test_bad_files(layer, text, message):
    with pytest.raises(UserError, match=message):
        resolve(Config, layer(text))


def test_bad_keywords_name_where_they_came_from():
    with pytest.raises(UserError, match=r"Unknown key 'epoch' in train\(\)\. Did you mean 'epochs'"):
        resolve(Config, None, " in train()", epoch=3)
    with pytest.raises(UserError, match=r"lr = -1 in train\(\): input should be greater than 0"):
        resolve(Config, None, " in train()", lr=-1)


def test_bad_flag_names_the_nearest():
    with pytest.raises(UserError, match=r"Unknown flag --epoch. Did you mean '--epochs'"):
        parse_config(Config, "train", "", ["--epoch", "3"])


def test_missing_file_or_folder_names_the_recipes(tmp_path):
    for name in ("nowhere.yaml", str(tmp_path)):
        with pytest.raises(UserError, match=r"No recipe or file .*Recipes: cifar-flip, "):
            resolve(Config, name)


def test_an_empty_file_changes_nothing(layer):
    assert read_layer(layer("# nothing\n")) == {}
    assert resolve(Config, layer("")) == resolve(Config)


def test_values_have_their_types(layer):
    got = resolve(Config, layer("lr: 5e-2\nmilestones: [0.5, 1]\namp: yes\nflip_map: [1, 0]\nmeta_batch_size:\n"))
    assert (got.lr, got.milestones, got.amp, got.flip_map, got.meta_batch_size) == (0.05, (0.5, 1.0), True, (1, 0), None)
    assert isinstance(got.milestones[1], float)


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")])
def test_the_words_on_and_off_may_stand_bare_in_a_file(layer, word, value):
    assert resolve(Config, layer(f"cuda_graph: {word}\n")).cuda_graph == value


def test_no_amp_beats_the_file(layer):
    path = layer("amp: true\n")
    assert resolve(Config, path).amp
    assert not parse_config(Config, "train", "", ["--config", path, "--no-amp"]).amp


def test_to_dict_survives_yaml():
    got = resolve(CompareConfig, "cifar-flip", flip_map=(1, 0), weight_decay=1e-5)
    assert validate(CompareConfig, yaml.safe_load(yaml.safe_dump(to_dict(got)))) == got


@pytest.mark.parametrize("kind", [Config, CompareConfig, CheckConfig])
def test_every_setting_has_a_help_text_under_it_and_a_title(kind):
    settings = list_settings(kind)
    assert list(settings) == [field.name for field in dataclasses.fields(add_method_settings(kind))]
    for setting in settings.values():
        assert setting.help.endswith((".", ")")), setting.name
        assert setting.title


def test_conditions_name_settings_and_values_that_there_are():
    settings = list_settings(Config)
    for setting in settings.values():
        for name, values in ((name, values) for only in setting.conditions for name, values in only.conditions.items()):
            known = settings[name].choices
            assert not known or set(values) <= set(known), setting.name
            assert not settings[name].is_switch or values == (True,), setting.name


def test_help_texts_from_a_zip(tmp_path):
    """As from an installed wheel: the text is the source's, wherever that is read from."""
    root = Path(fastadvisor.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as package:
        for file in (*root.glob("*.py"), *root.glob("config/*.py"), *root.glob("recipes/*")):
            package.write(file, file.relative_to(root.parent))
    code = "from fastadvisor.config import Config, list_settings; print(list_settings(Config)['epochs'].help)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path / "package.zip")}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "Passes over the training set.\n"


# Settings of one method


@dataclass
class Settings:
    """As in a method's own file."""

    focus: Annotated[Positive, ESSENTIAL] = 2.0
    """How much the easy samples are played down."""
    balance: Annotated[Literal["none", "effective"], Only(method="focus")] = "none"
    """Weights of the classes."""


@pytest.fixture
def focus():
    """A method that registers itself."""
    before = dict(registry._SETTINGS)
    register_method("focus", Settings)
    yield
    registry._SETTINGS.clear()
    registry._SETTINGS.update(before)
    registry._completed.cache_clear()
    registry._of_methods.cache_clear()


def test_a_method_brings_its_own_settings(focus, layer):
    got = resolve(Config, layer("focus: 3\n"), method="focus", balance="effective")
    assert isinstance(got, Config)
    assert (to_dict(got)["focus"], got.balance) == (3.0, "effective")
    assert select_settings(Settings, got) == Settings(3.0, "effective")
    assert dataclasses.replace(got, focus=1.0).focus == 1.0
    assert resolve(CompareConfig).focus == 2.0
    with pytest.raises(UserError, match=r"focus = -1: input should be greater than 0"):
        resolve(Config, focus=-1)
    settings = list_settings(Config)
    assert settings["focus"].methods == ("focus",)
    assert settings["focus"].essential
    assert (settings["focus"].title, settings["focus"].help) == ("Method focus", "How much the easy samples are played down.")
    assert methods_that_use("epochs") is None


def test_without_the_method_there_is_no_such_setting():
    with pytest.raises(UserError, match="Unknown key 'focus'"):
        resolve(Config, focus=3)


def test_methods_that_share_a_setting_must_agree(focus):
    @dataclass
    class Other:
        focus: Positive = 1.0

    register_method("same", Settings)
    assert methods_that_use("focus") == ("focus", "same")
    with pytest.raises(TypeError, match="focus of other has another type or default than that of focus"):
        register_method("other", Other)


def test_nearest():
    assert suggest("epoch", ["epochs", "lr"]) == " Did you mean 'epochs'?"
    assert suggest("zzzz", ["epochs", "lr"]) == ""


def test_turning_noise_off_undoes_the_recipes_rate():
    assert resolve(Config).noise_rate == 0.4
    assert resolve(Config, noise="none").noise_rate == 0.0
    assert resolve(Config, noise="none", noise_rate=0.3).noise_rate == 0.3  # prepare() refuses this one


def test_labels_from_a_file_replace_the_recipes_noise():
    resolved = resolve(Config, labels="labels.npy")
    assert (resolved.noise, resolved.noise_rate) == ("none", 0.0)
    assert resolve(Config, labels="labels.npy", noise="flip").noise == "flip"  # prepare() refuses this one


def test_a_length_in_epochs_undoes_the_iterations_of_the_layers_below(layer):
    assert resolve(Config, "cifar-lt-augmented").iterations == 13_000
    assert resolve(Config, "cifar-lt-augmented", epochs=5).iterations is None
    both = resolve(Config, "cifar-lt-augmented", epochs=5, iterations=9)  # in one layer
    assert (both.epochs, both.iterations) == (5, 9)
    run = layer("iterations: 9\nepochs: 2\n")  # as a run writes them
    assert resolve(Config, run).iterations == 9
    assert (resolve(Config, run, epochs=4).epochs, resolve(Config, run, epochs=4).iterations) == (4, None)
    assert build_config(Config, resolve(Config, run), {"epochs": 4}).iterations is None


def test_other_programs_names_are_none_of_ours_and_lead_to_one():
    known = list_settings(CompareConfig)
    others = [name for names in (*OTHER_NAMES.values(), *ANSWERS) for name in names.split()]
    assert not set(others) & set(known)
    assert len(set(others)) == len(others)
    assert set(OTHER_NAMES) <= {*known, "config"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("learning_rate", "it is called --lr here."),
        ("Learning-Rate", "it is called --lr here."),
        ("bs", "it is called --batch-size here."),
        ("patience", "there is no early stopping; best.pt keeps the best epoch"),
        ("zzz", None),
    ],
)
def test_near_misses(layer, name, says):
    answer = answer_near_miss(name, list_settings(Config))
    assert answer is None if says is None else answer.startswith(says)
    if says is not None:
        for source, keywords in ((layer(f"{name}: 1\n"), {}), (None, {name: 1})):
            with pytest.raises(UserError, match=rf"^Unknown key '{name}'.*: {says}"):
                resolve(Config, source, **keywords)


def test_a_message_names_the_layer_that_a_value_is_from(layer):
    with pytest.raises(UserError, match=r"^lr = -1: input"):
        resolve(Config, layer("epochs: 3\n"), lr=-1)
    with pytest.raises(UserError, match=r"^epochs = 0 \(from .*mine.yaml\): input"):
        resolve(Config, layer("epochs: 0\n"), lr=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_registered(name):
    assert name in registered_methods()
    for setting in map(list_settings(Config).get, (field.name for field in dataclasses.fields(METHODS[name].Settings))):
        assert name in setting.methods
        assert setting.help.endswith((".", ")")), setting.name


def test_from_python_a_method_has_its_settings():
    assert fastadvisor.Config(method="mes", beta_probability=0.5).beta_probability == 0.5
    assert resolve(Config, method="finetune", finetune_fraction=0.5).finetune_fraction == 0.5
