"""The time of imports: each in a process of its own."""

import json

import pytest

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install -r requirements-demo.txt")

from benchmarks import imports  # noqa: E402
from benchmarks.report import documents as report  # noqa: E402


def test_the_command_measures_new_processes(tmp_path, capsys):
    assert imports.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "imports.json").read_text())
    assert found["ms"]["torch"]["samples"][0] > found["ms"]["fastclip"]["samples"][0] > 0.1
    assert 0.1 < found["extension_mib"] < 100
    assert "import fastclip" in capsys.readouterr().out
    assert report.main([str(tmp_path / "imports.json")]) == 0
    assert "| `import fastclip` |" in capsys.readouterr().out


def test_bad_options_are_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        imports.parse(["--rounds", "0"])
    assert "--rounds is at least 1" in capsys.readouterr().err
