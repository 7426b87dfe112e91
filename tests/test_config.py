import dataclasses

import pytest
import yaml

from fastadvisor import recipes
from fastadvisor.cli import parse_config
from fastadvisor.config import CompareConfig, Config, configured, read_layer, resolve, to_dict, validated
from fastadvisor.errors import UserError, nearest


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
    assert type(got) is kind
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


def test_no_amp_beats_the_file(layer):
    path = layer("amp: true\n")
    assert resolve(Config, path).amp
    assert not parse_config(Config, "train", "", ["--config", path, "--no-amp"]).amp


def test_to_dict_survives_yaml():
    got = resolve(CompareConfig, "cifar-flip", flip_map=(1, 0), weight_decay=1e-5)
    assert validated(CompareConfig, yaml.safe_load(yaml.safe_dump(to_dict(got)))) == got


def test_every_field_has_a_help_text_under_it():
    import inspect

    from fastadvisor.config import settings

    source = inspect.getsource(settings)
    for field in dataclasses.fields(CompareConfig):
        line = source.split(f"\n    {field.name}: ")[1].split("\n")[1]
        assert line.strip().startswith('"""'), field.name


def test_nearest():
    assert nearest("epoch", ["epochs", "lr"]) == " Did you mean 'epochs'?"
    assert nearest("zzzz", ["epochs", "lr"]) == ""


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
    assert configured(Config, resolve(Config, run), {"epochs": 4}).iterations is None
