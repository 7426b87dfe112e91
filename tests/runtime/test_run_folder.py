import json
import os
from pathlib import Path

import pytest
import yaml

from fastadvisor.config import Config, resolve, to_dict
from fastadvisor.errors import UserError
from fastadvisor.runtime import run_folder
from fastadvisor.runtime.run_folder import RunFolder, write_text


@pytest.fixture
def settings():
    return resolve(Config)


@pytest.fixture
def begun(tmp_path, settings):
    """A run that stopped after three epochs."""
    folder = RunFolder.create(str(tmp_path / "run"), settings, "x")
    for epoch in range(3):
        folder.append_metrics({"epoch": epoch})
    folder.last.write_bytes(b"state")
    return folder


def test_create_writes_a_config_that_resolves_to_the_same(tmp_path, settings):
    folder = RunFolder.create(str(tmp_path / "a" / "b"), settings, "x")
    assert folder.path == tmp_path / "a" / "b"
    assert resolve(Config, str(folder.config)) == settings
    assert sorted(os.listdir(folder.path)) == ["config.yaml"]


def test_default_names_are_new_each_time(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Clock:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    names = [RunFolder.create(None, settings, "digits-timm/x").path for _ in range(3)]
    stem = "runs/20260102-030405-digits-timm-x"
    assert names == [Path(stem), Path(f"{stem}-2"), Path(f"{stem}-3")]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "last.pt"])
def test_an_output_with_a_run_in_it_is_left_alone(tmp_path, settings, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=r"already holds a run; choose another --output, or add --resume to continue it\."):
        RunFolder.create(str(tmp_path), settings, "x")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [(name, "precious")]


def test_an_output_with_other_files_in_it_is_left_alone(tmp_path, settings):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\); choose another --output"):
        RunFolder.create(str(tmp_path), settings, "x")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_output_is_used(tmp_path, settings):
    assert RunFolder.create(str(tmp_path), settings, "x").config.is_file()


def test_output_is_a_file(tmp_path, settings):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file; name a folder"):
        RunFolder.create(str(tmp_path / "file"), settings, "x")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        RunFolder.create(str(tmp_path / "file" / "under"), settings, "x")
    assert (tmp_path / "file").read_text() == "precious"


def test_output_cannot_be_written(tmp_path, settings, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no mode bits stop
    with pytest.raises(UserError, match=r"Output folder .* cannot be written \(Permission denied\)"):
        RunFolder.create(str(tmp_path / "a"), settings, "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Output folder runs cannot be written \(Permission denied\)"):
        RunFolder.create(None, settings, "x")


def test_resume_keeps_what_is_there(begun, settings):
    settings.device, settings.resume, settings.output, settings.progress = "cpu", True, str(begun.path), False
    folder = RunFolder.open_for_resume(str(begun.path), settings)
    assert folder.path == begun.path
    assert len(folder.metrics.read_text().splitlines()) == 3


@pytest.mark.parametrize(("key", "value", "old"), [("lr", 0.2, "0.1"), ("flip_map", (1, 0), "None")])
def test_resume_with_another_setting_names_it(begun, settings, key, value, old):
    setattr(settings, key, value)
    new = repr(list(value) if isinstance(value, tuple) else value)
    with pytest.raises(UserError) as raised:
        RunFolder.open_for_resume(str(begun.path), settings)
    assert str(raised.value).startswith(f"{key} is {old} in {begun.config} and {new} now; resume with")


def test_resume_with_a_setting_the_run_did_not_know(begun, settings):
    values = to_dict(settings)
    del values["momentum"]
    begun.config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"momentum is 'not set' in .* and 0.9 now"):
        RunFolder.open_for_resume(str(begun.path), settings)
    begun.config.write_text(yaml.safe_dump({**to_dict(settings), "gone": 1}))
    with pytest.raises(UserError, match=r"gone is 1 in .* and 'not set' now"):
        RunFolder.open_for_resume(str(begun.path), settings)


def test_resume_without_something_to_resume(tmp_path, begun, settings):
    with pytest.raises(UserError, match="name it with --output"):
        RunFolder.open_for_resume(None, settings)
    with pytest.raises(UserError, match=r"There is no last.pt in .*nowhere to resume from"):
        RunFolder.open_for_resume(str(tmp_path / "nowhere"), settings)
    for text in (None, "[broken", "- a"):
        begun.config.unlink() if text is None else begun.config.write_text(text)
        with pytest.raises(UserError, match=r"config.yaml is missing or damaged"):
            RunFolder.open_for_resume(str(begun.path), settings)


def test_keep_metrics_drops_later_epochs_and_half_a_line(begun):
    begun.truncate_metrics(2)
    assert [json.loads(line) for line in begun.metrics.read_text().splitlines()] == [{"epoch": 0}, {"epoch": 1}]
    with begun.metrics.open("a") as file:
        file.write('{"epo')
    begun.truncate_metrics(3)
    begun.append_metrics({"epoch": 2})
    assert [json.loads(line)["epoch"] for line in begun.metrics.read_text().splitlines()] == [0, 1, 2]


def test_keep_metrics_without_metrics(tmp_path):
    RunFolder(tmp_path).truncate_metrics(3)
    assert os.listdir(tmp_path) == []


def test_nan_and_infinities_become_null(begun):
    values = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), "nan", None, True)}}
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, "nan", None, True]}}
    begun.append_metrics(values)
    begun.write_summary(values)
    assert json.loads(begun.metrics.read_text().splitlines()[-1]) == expected
    assert json.loads(begun.summary.read_text()) == expected


def test_metrics_are_on_disk_at_once(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"epoch": 0})
    assert folder.metrics.read_text() == '{"epoch": 0}\n'


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"summary.json cannot be written \(No space left"):
        write_text(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("summary.json", "old")]
