"""The article's training: bits, table, checkpoints and messages, over generated tones."""

import csv
import errno
import json
import os
import random
import signal

import pytest
import torch

for module in ("matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the examples need {module}")

from examples.article import __main__ as article  # noqa: E402
from examples.article import update_memory  # noqa: E402
from examples.article.frame_labels import CEPSTRA, FrameLabels, cepstra  # noqa: E402
from examples.speech import data as speech_data  # noqa: E402
from examples.speech.models import CTC_MODELS, DNN  # noqa: E402
from examples.support import safe_files  # noqa: E402
from examples.support.console import SpeechDataError  # noqa: E402
from tests.support.recordings import tone, write_recordings, write_wav  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return write_recordings(tmp_path / "data")


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes most of a tiny run."""
    monkeypatch.setattr(article.report, "draw", lambda folder, *_: folder / "article.png")


def run_article(capsys, data, *more, out="out"):
    code = article.main(["--device", "cpu", "--data", str(data), "--out", str(data.parent / out), *more])
    return code, *capsys.readouterr()


def checkpoint(data, name, out="out"):
    return torch.load(data.parent / out / f"article_{name}.pt", weights_only=True)


def pressing_ctrl_c(monkeypatch, at_step, times=1):
    """Ctrl-C while the progress bar is drawn, after that step of this run."""

    class Progress(article.progress().__class__):
        def update(self, n=1):
            super().update(n)
            if self.n - self.initial == at_step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(article, "progress", lambda **settings: Progress(**settings))


def no_space(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safe_files.os, "fsync", fsync)


def test_all_models(folder, capsys):
    code, out, said = run_article(capsys, folder, "--epochs", "2")
    assert code == 0, said
    assert "agree in every bit" in out
    for arm in ("no clipping", "Python loop", "fastclip"):
        assert sum(f"  {arm} " in line for line in out.splitlines()) == 3
    results = folder.parent / "out"
    assert (results / "article.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((results / "article.json").read_text(), parse_constant=pytest.fail)
    assert report["settings"]["identical_bits"] == {"dnn": True, "cnn": True, "rnn": True}
    assert report["versions"]["torch"] == torch.__version__
    rows = {(row["model"], row["arm"]): row for row in report["results"]}
    assert len(rows) == 9
    for name in ("dnn", "cnn", "rnn"):
        loop, fast = rows[name, "Python loop"], rows[name, "fastclip"]
        for same in ("held out", "final_loss", "parameters", "steps", "state_bytes"):
            assert fast[same] == loop[same]
        assert 0 <= fast["clamped_percent"] <= 100
        assert fast["extra_bytes"] < 100
    assert rows["dnn", "fastclip"]["parameters"] == 80 * 256 + 256 + 256 * 64 + 64
    with open(results / "article.csv", newline="") as sheet:
        assert [(row["model"], row["arm"]) for row in csv.DictReader(sheet)] == list(rows)


@pytest.mark.parametrize("name, step", [("dnn", 7), ("cnn", 1), ("rnn", 2)])
def test_ctrl_c_and_resume_end_at_the_same_bits(folder, capsys, no_picture, monkeypatch, name, step):
    options = ["--model", name, "--epochs", "3"]
    assert run_article(capsys, folder, *options, out="whole")[0] == 0
    with monkeypatch.context() as pressed:
        pressing_ctrl_c(pressed, at_step=step)
        code, _, said = run_article(capsys, folder, *options)
    assert code == 130
    assert f"Stopped after step {step} of" in said and "--resume" in said and "Traceback" not in said
    assert checkpoint(folder, name)["taken"] == step
    assert run_article(capsys, folder, *options, "--resume")[0] == 0
    whole, resumed = checkpoint(folder, name, "whole"), checkpoint(folder, name)
    assert whole["taken"] == resumed["taken"] > step
    for arm, state in whole["arms"].items():
        other = resumed["arms"][arm]
        torch.testing.assert_close(other["model"], state["model"], rtol=0, atol=0, equal_nan=True)
        found, expected = other["optimizer"], state["optimizer"]
        assert found["param_groups"] == expected["param_groups"]
        torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0, equal_nan=True)
        assert other["measured"]["losses"] == state["measured"]["losses"]


def test_finished_run_resumes_to_its_table(folder, capsys, no_picture):
    options = ["--model", "cnn", "--epochs", "1"]
    _, first, _ = run_article(capsys, folder, *options)
    code, again, _ = run_article(capsys, folder, *options, "--resume")
    assert code == 0
    assert [row[:40] for row in first.splitlines() if row.startswith("cnn")] == [
        row[:40] for row in again.splitlines() if row.startswith("cnn")
    ]


def test_on_any_device(folder, capsys, no_picture, device):
    code, out, said = run_article(capsys, folder, "--epochs", "1", "--device", device)
    assert code == 0, said
    assert ("agree in every bit" in out) == (device == "cpu")


def test_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint_of_the_epoch(folder, capsys, monkeypatch):
    pressing_ctrl_c(monkeypatch, at_step=3, times=2)
    code, _, said = run_article(capsys, folder, "--model", "cnn", "--epochs", "4")
    assert code == 130 and "Stopped" in said and "Traceback" not in said
    assert checkpoint(folder, "cnn")["taken"] == 2  # an epoch is one step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_space_keeps_the_old_checkpoint(folder, capsys, no_picture, monkeypatch):
    options = ["--model", "cnn", "--epochs"]
    assert run_article(capsys, folder, *options, "1")[0] == 0
    before = sorted(path.name for path in (folder.parent / "out").iterdir())
    with monkeypatch.context() as full:
        no_space(full)
        code, _, said = run_article(capsys, folder, *options, "3", "--resume")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: ") and "article_cnn.pt: No space left on device" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (folder.parent / "out").iterdir()) == before
    assert checkpoint(folder, "cnn")["taken"] == 1
    assert run_article(capsys, folder, *options, "3", "--resume")[0] == 0
    assert checkpoint(folder, "cnn")["taken"] == 3


def unknown_symbol(folder):
    (folder / "transcripts.txt").write_text("u1.wav\tab\nu2.wav\ta\ufffdb\n", encoding="utf-8")


BAD_DATA = {
    "missing": (lambda f: [path.unlink() for path in f.iterdir()] and f.rmdir(), "no such folder"),
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "folder is empty"),
    "broken wav": (lambda f: (f / "u3.wav").write_bytes(b"this is no sound, but a text"), "u3.wav: not a wav"),
    "unknown symbol": (unknown_symbol, "line 2: the transcript of u2.wav has a symbol that is no text, U+FFFD"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(folder, capsys, case):
    spoil, expected = BAD_DATA[case]
    spoil(folder)
    code, _, said = run_article(capsys, folder)
    assert code == 2 and said.startswith("error: ") and expected in said and said.count("\n") == 1


def test_too_little_speech_for_the_classes(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        write_wav(data / f"{name}.wav", tone(seconds=0.2))
    (data / "transcripts.txt").write_text("a x\nb x\n")
    code, _, said = run_article(capsys, data, "--model", "dnn")
    assert code == 2 and "21 frames of 10 ms to train on, where 64 classes need 64" in said


def test_what_can_not_be_resumed(folder, capsys, no_picture):
    options = ["--model", "cnn", "--epochs", "1"]
    code, _, said = run_article(capsys, folder, *options, "--resume")
    assert code == 2 and "has no checkpoint article_cnn.pt" in said
    assert run_article(capsys, folder, *options)[0] == 0
    code, _, said = run_article(capsys, folder, *options, "--resume", "--seed", "1")
    assert code == 2 and "article_cnn.pt: its seed is not this run's" in said
    for i in range(12):
        write_wav(folder / f"u{i}.wav", tone(hertz=500))
    code, _, said = run_article(capsys, folder, *options, "--resume")
    assert code == 2 and "article_cnn.pt: its data is not this run's" in said
    (folder.parent / "out" / "article_cnn.pt").write_bytes(b"half a checkpoint")
    code, _, said = run_article(capsys, folder, *options, "--resume")
    assert code == 2 and "article_cnn.pt: not a checkpoint, or damaged" in said


def test_a_difference_is_an_error(folder, capsys, no_picture, monkeypatch):
    monkeypatch.setattr("fastclip.SGD", lambda params, lr, momentum, clip_value: torch.optim.SGD(params, lr, momentum))
    code, _, said = run_article(capsys, folder, "--model", "cnn", "--epochs", "2")
    assert code == 1 and "error: cnn: the Python loop and fastclip differ: parameter conv.weight" in said


def test_help_tells_the_story(capsys):
    with pytest.raises(SystemExit) as stop:
        article.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "80-256-64" in out and "--resume" in out and "HuBERT" in out


def test_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    safe_files.write(path, b"old")
    no_space(monkeypatch)
    with pytest.raises(SpeechDataError, match="No space left on device; what was there before is kept"):
        safe_files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_allocations_are_seen():
    p = torch.randn(1000)
    assert update_memory.allocated(lambda: p.clamp_(-1, 1)) == 0
    assert update_memory.allocated(lambda: p.clamp(-1, 1)) == 4000
    assert update_memory.allocated(lambda: p.clamp(-1, 1) + p.abs()) == 12000


def test_cepstra_of_a_ramp_have_constant_slope():
    ramp = torch.arange(20.0)[:, None].expand(20, 80)  # louder by 1 in every band and frame
    values = cepstra(ramp)
    assert values.shape == (20, 3 * CEPSTRA)
    torch.testing.assert_close(values[:, 0], 80 * torch.arange(20.0))
    torch.testing.assert_close(values[2:-2, CEPSTRA], torch.full((16,), 80.0))
    torch.testing.assert_close(values[4:-4, 2 * CEPSTRA], torch.zeros(12))


def test_frame_labels_are_reproducible_and_near_their_centre():
    generator = torch.Generator().manual_seed(0)
    utterances = [torch.randn(50, 80, generator=generator) for _ in range(4)]
    one, other = (FrameLabels(utterances, classes=8, seed=3) for _ in range(2))
    assert torch.equal(one(utterances[0]), other(utterances[0]))
    assert len(torch.cat([one(each) for each in utterances]).unique()) == 8


def test_models_shapes():
    assert DNN()(torch.randn(2, 30, 80)).shape == (2, 30, 64)
    for make in CTC_MODELS.values():
        log_probs = make(10, 80)(torch.randn(2, 30, 80))
        assert log_probs.shape == (8, 2, 11)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(8, 2))


def test_speakers_in_folders_are_held_out_whole(tmp_path):
    lines = []
    for speaker in range(3):
        (tmp_path / f"s{speaker}").mkdir()
        for i in range(2):
            write_wav(tmp_path / f"s{speaker}/{i}.wav", tone())
            lines.append(f"s{speaker}/{i}.wav\t{'abc'[speaker]}")
    (tmp_path / "transcripts.txt").write_text("\n".join(lines) + "\n")
    speech = speech_data.own_recordings(tmp_path)
    train, test = ({utterance.text for utterance in part} for part in (speech.train, speech.test))
    assert len(train) == 2 and len(test) == 1 and not train & test
    assert "1 of 3 speakers held out" in speech.caption


def test_unheard_voices_are_not_trained_on(monkeypatch):
    voices = {voice: [f"{voice}/{digit}.wav" for digit in range(10)] for voice in ("en", "it", "it-menardi", "ru")}
    monkeypatch.setattr(speech_data, "find_clips", lambda cache: ("recorded", voices))
    monkeypatch.setattr(speech_data, "read_wav", lambda path, rate: path)
    monkeypatch.setattr(speech_data, "_without_silence", lambda samples: samples)
    monkeypatch.setattr(
        speech_data, "digit_string", lambda clips, make: speech_data.Utterance(random.choice(clips)[0], "1")
    )
    speech = speech_data.digit_strings("cache", 0, 30, 10, unheard_strings=5)
    assert {utterance.samples for utterance in speech.unheard} == {"it-menardi/0.wav"}
    heard = speech.train + speech.test
    assert len(speech.train) == 30 and len(speech.test) == 10
    assert "it-menardi/0.wav" not in {utterance.samples for utterance in heard}
    assert "unheard: it-menardi" in speech.caption
    assert speech_data.digit_strings("cache", 0, 30, 10).unheard == []
