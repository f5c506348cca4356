"""Files are written complete or not at all, and read with one clear error."""

import json
import os

import pytest

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import check_output, read_json, write_atomically


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(LayerselError, match=r"plan.json cannot be written .disk full"):
        write_atomically(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_is_as_open_to_others_as_the_users_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "ours", b"new")
        (tmp_path / "theirs").write_bytes(b"new")
    finally:
        os.umask(before)
    ours, theirs = ((tmp_path / name).stat().st_mode for name in ("ours", "theirs"))
    assert oct(ours) == oct(theirs)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "layersel").write_text("not a folder")
    with pytest.raises(LayerselError, match=r"layersel/plan.json cannot be written: .*/layersel is a file, where"):
        write_atomically(tmp_path / "layersel" / "plan.json", b"new")
    with pytest.raises(LayerselError, match=r"^output_dir: .*/layersel is a file, where a folder is needed. Move it"):
        check_output(tmp_path, ("plan.json",))
    with pytest.raises(LayerselError, match=r"^output_dir: .*/layersel is a file"):
        check_output(tmp_path / "layersel" / "below", ("plan.json",))


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "layersel" / "plan.json").mkdir(parents=True)
    with pytest.raises(LayerselError, match=r"plan.json cannot be written .Is a directory"):
        write_atomically(tmp_path / "layersel" / "plan.json", b"new")
    with pytest.raises(LayerselError, match=r"^output_dir: .*/plan.json is a folder, where a file is needed"):
        check_output(tmp_path, ("plan.json",))
    assert [entry.name for entry in (tmp_path / "layersel").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("target", ["layersel", "nowhere"])
def test_a_link_that_leads_nowhere_in_place_of_a_folder_is_named(tmp_path, target):
    (tmp_path / "layersel").symlink_to(tmp_path / target)  # to itself: a loop
    with pytest.raises(
        LayerselError,
        match=r"^output_dir: .*/layersel cannot be made \((the link .*/layersel is broken|Too many lev)",
    ):
        check_output(tmp_path, ("plan.json",))


def test_a_link_to_a_folder_is_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "layersel").symlink_to(tmp_path / "elsewhere")
    check_output(tmp_path, ("plan.json",))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("loop/run", "cannot be made (Too many levels of symbolic links). Set another output_dir."),
        ("loop", "cannot be made (Too many levels of symbolic links)"),
        ("dangling/run", "dangling is broken"),
        ("x" * 300, "cannot be made (File name too long)"),
        ("/".join(["x" * 200] * 30), "cannot be made (File name too long)"),
        ("a\0b", "cannot be made (embedded null byte)"),
        ("/proc/nowhere/run", "nothing can be written into /proc"),
        ("file/run", "is a file, where a folder is needed"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_it_is_needed(tmp_path, folder, message):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LayerselError, match=r"^output_dir: ") as refused:
        check_output(tmp_path / folder, ("plan.json",))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises((OSError, ValueError)):
        os.makedirs(tmp_path / folder)


def test_looking_whether_a_run_can_write_leaves_no_trace(tmp_path):
    check_output(tmp_path / "new" / "run", ("plan.json",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not valid JSON, truncated or damaged"),
        (b"{", "not valid JSON, truncated or damaged"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff\xfe{}", "damaged .UnicodeDecodeError"),
    ],
)
def test_json_that_is_damaged_is_refused_in_one_sentence(tmp_path, content, fault):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(LayerselError, match=rf"^KEY: .*plan.json is .*{fault}.*Make it anew.$"):
        read_json("KEY", path, "Make it anew.")


def test_what_is_no_file_is_refused_in_one_sentence(tmp_path):
    for path, fault in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), ("a\0b", "null byte")):
        with pytest.raises(LayerselError, match=rf"^KEY: .*{fault}.*Make it anew.$"):
            read_json("KEY", path, "Make it anew.")


def test_valid_json_is_read_as_it_is(tmp_path):
    content = {"a": [1, 2.5, None, True, "ä"], "b": {}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_json("KEY", tmp_path / "a.json", "") == content
