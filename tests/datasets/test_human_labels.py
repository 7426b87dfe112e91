"""CIFAR-10N's files of human labels: dicts of numpy arrays, read without running what a pickle may hold."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.labels_file import read_labels
from fastadvisor.errors import UserError

TRUE = np.arange(60, dtype=np.int64) % 10


@pytest.fixture
def human(tmp_path):
    noisy = np.where(np.arange(60) % 3 == 0, (TRUE + 1) % 10, TRUE)
    names = ("aggre_label", "random_label1", "random_label2", "random_label3")
    labels = {"clean_label": TRUE, "worse_label": noisy, **{name: (TRUE + n) % 10 for n, name in enumerate(names)}}
    torch.save(labels, tmp_path / "CIFAR-10_human.pt")
    return tmp_path / "CIFAR-10_human.pt"


IMAGES = ArrayImages(torch.zeros(60, 1, 1, 3, dtype=torch.uint8))
DIGITS = [str(digit) for digit in range(10)]


def read(path, key="worse_label", true_labels=TRUE):
    return read_labels(str(path), IMAGES, true_labels, DIGITS, key).labels


def test_the_labels_of_the_key_are_read(human):
    assert read(human).tolist() == torch.load(human, weights_only=False)["worse_label"].tolist()
    assert read(human, "random_label2").tolist() == ((TRUE + 2) % 10).tolist()
    assert read(human).dtype == np.int64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_way_such_a_file_is_written(tmp_path, dtype, legacy):
    path = tmp_path / "labels.pt"
    torch.save({"worse_label": TRUE.astype(dtype)}, path, _use_new_zipfile_serialization=not legacy)
    assert read(path).tolist() == TRUE.tolist()
    torch.save({"worse_label": torch.from_numpy(TRUE.astype(dtype))}, path)
    assert read(path).tolist() == TRUE.tolist()
    torch.save({"worse_label": TRUE.tolist(), "about": "text", "rate": 0.4}, path)
    assert read(path).tolist() == TRUE.tolist()


@pytest.mark.parametrize("other", [[[1, 2], [3]], torch.ones(3, dtype=torch.bfloat16), {"a": [1]}, None])
def test_another_entry_that_numpy_cannot_take_is_passed_over(tmp_path, other):
    path = tmp_path / "labels.pt"
    torch.save({"votes": other, "worse_label": TRUE}, path)
    assert read(path).tolist() == TRUE.tolist()
    with pytest.raises(UserError, match="holds no votes"):
        read(path, "votes")


def test_files_of_numpy_before_2_name_its_parts_otherwise(tmp_path):
    """The published files were written in 2021."""
    path, written = tmp_path / "labels.pt", tmp_path / "new.pt"
    torch.save({"worse_label": TRUE}, written)
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert b"cnumpy.core.multiarray\n_reconstruct" in content
            new.writestr(entry, content)
    assert read(path).tolist() == TRUE.tolist()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_a_pickle_would_run_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"clean_label": TRUE, "worse_label": Harm(trace)}, tmp_path / "one.pt")
    (tmp_path / "two.pt").write_bytes(pickle.dumps({"worse_label": Harm(trace)}, protocol=2))
    np.save(tmp_path / "three.npy", np.array({"worse_label": Harm(trace)}, dtype=object), allow_pickle=True)
    for name in ("one.pt", "two.pt"):
        with pytest.raises(UserError, match="does not hold an integer tensor of labels"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="is not a plain array of numbers"):
        read(tmp_path / "three.npy", key=None)
    assert not trace.exists()


def test_the_clean_labels_must_be_the_data_sets(human):
    other = TRUE.copy()
    other[[7, 9]] = 0
    with pytest.raises(UserError, match=r"not the data set's label for 2 of 60 images \(first: image 7\): .*another order"):
        read(human, true_labels=other)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (None, "holds several labels: name one with --labels-key, of clean_label, worse_label, aggre_label"),
        ("worst_label", "holds no worst_label. Did you mean 'worse_label'?"),
    ],
)
def test_a_key_that_is_missing_or_wrong(human, key, sentence):
    with pytest.raises(UserError, match="holds") as error:
        read(human, key)
    assert sentence in str(error.value)


def test_a_key_where_there_is_nothing_to_choose(tmp_path):
    torch.save(torch.from_numpy(TRUE), tmp_path / "labels.pt")
    np.save(tmp_path / "labels.npy", TRUE)
    for name in ("labels.pt", "labels.npy"):
        with pytest.raises(UserError, match="--labels-key worse_label is for files that hold several labels"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="name the file with --labels"):
        prepare(load_source(Config()), resolve(Config, labels_key="worse_label"), 0)


def test_a_column_of_a_csv_can_be_named(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(
        "id,clean_label,worse_label\n" + "".join(f"{i},{label},{(label + 1) % 10}\n" for i, label in enumerate(TRUE))
    )
    assert read(path).tolist() == ((TRUE + 1) % 10).tolist()
    with pytest.raises(UserError, match="has no column other"):
        read(path, "other")


def test_a_run_believes_the_human_labels(human, tmp_path):
    source = load_source(Config())
    labels = source.train.labels.numpy()
    torch.save({"clean_label": labels, "worse_label": (labels + 1) % 10}, human)
    data = prepare(source, resolve(Config, labels=str(human), labels_key="worse_label", imbalance_factor=1.0), 0)
    assert data.noise_rate() == 1
    assert (data.labels[data.meta_ids] == data.true_labels[data.meta_ids]).all()
