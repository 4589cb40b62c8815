"""The two libraries that keep torchaudio from importing are deleted, and only where they do."""

import sys

import pytest
import torch

from tests.support import torchaudio_on_cpu

FAILS = "import pathlib; assert not list(pathlib.Path(__file__).parent.glob('lib/*torchaudio.*')), 'needs CUDA'"


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts a package called torchaudio before all others; returns the names of its libraries when called again."""

    def install(code):
        package = tmp_path / "torchaudio"
        (package / "lib").mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        for name in ("_torchaudio.abi3.so", "libtorchaudio.abi3.so", "other.so"):
            (package / "lib" / name).touch()
        return lambda: sorted(path.name for path in (package / "lib").iterdir())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    return install


def test_what_fails_to_import_loses_two_libraries_once(install, capsys):
    libraries = install(FAILS)
    assert torchaudio_on_cpu.main() == 0
    assert libraries() == ["other.so"]
    assert capsys.readouterr().out.count("deleted") == 2
    assert torchaudio_on_cpu.main() == 0
    assert capsys.readouterr().out == "torchaudio imports\n"


@pytest.mark.parametrize(("code", "cuda", "exit_code"), [("", None, 0), (FAILS, "13.0", 1)])
def test_nothing_is_deleted_where_it_imports_or_torch_has_cuda(code, cuda, exit_code, install, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    libraries = install(code)
    assert torchaudio_on_cpu.main() == exit_code
    assert len(libraries()) == 3
    assert ("needs CUDA" in capsys.readouterr().out) == bool(exit_code)


def test_another_reason_is_told(install, capsys):
    install("raise RuntimeError('too old')")
    assert torchaudio_on_cpu.main() == 1
    assert "RuntimeError: too old" in capsys.readouterr().out
