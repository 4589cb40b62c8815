"""The demo: what it says about bad data, and a tiny run over generated tones."""

import json
import struct

import pytest
import torch

for module in ("matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the demo needs {module}")

from examples.speech import __main__ as speech_demo  # noqa: E402
from examples.speech import clips as speech_clips  # noqa: E402
from examples.speech.batches import edit_distance, greedy_decode, word_error_rate  # noqa: E402
from examples.speech.data import read_wav, resample  # noqa: E402
from examples.speech.models import outputs_needed  # noqa: E402
from examples.support import lockstep  # noqa: E402
from tests.support.project import ROOT  # noqa: E402
from tests.support.recordings import tone, write_recordings, write_wav  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return write_recordings(tmp_path / "data")


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_demo(capsys, data, *more):
    try:
        code = speech_demo.main(["--device", "cpu", "--data", str(data), "--out", str(data.parent / "out"), *more])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def replace(folder, name, content):
    (folder / name).write_bytes(content)


def wav_header(bits=16, audio_format=1, rate=16000, channels=1, announced=3200, content=b"\0" * 3200):
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", audio_format, channels, rate, rate * block, block, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", announced) + content
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def transcripts(text):
    return lambda folder: replace(folder, "transcripts.txt", text if isinstance(text, bytes) else text.encode())


def wav(content):
    return lambda folder: replace(folder, "u3.wav", content)


BAD_DATA = {
    "missing wav": (lambda f: (f / "u3.wav").unlink(), ["transcripts.txt, line 4", "u3.wav"]),
    "no transcripts": (lambda f: (f / "transcripts.txt").unlink(), ["transcripts.txt", "no such file"]),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], ["data", "folder is empty"]),
    "empty transcript": (transcripts("u1.wav\tab\nu2.wav\t \n"), ["transcripts.txt, line 2", "u2.wav is empty"]),
    "one word": (transcripts("u1.wav\tab\n\nu2.wav,ab\n"), ["transcripts.txt, line 3", "one word", "u2.wav,ab"]),
    "no name": (transcripts("\tab\n"), ["transcripts.txt, line 1", "name of a wav file"]),
    "named twice": (transcripts("u1.wav\tab\nu1 ba\n"), ["transcripts.txt, line 2", "u1.wav", "already"]),
    "not UTF-8": (transcripts(b"u1.wav\t\xff\n"), ["transcripts.txt", "UTF-8", "byte 7"]),
    "one utterance": (transcripts("u1.wav\tab\n"), ["transcripts.txt", "1 utterance"]),
    "no utterance": (transcripts("\n"), ["transcripts.txt", "0 utterance"]),
    "too long for CTC": (transcripts("u1.wav\tab\nu2.wav\t" + 30 * "b"), ["u2.wav: too short", "needs 59", "gives 21"]),
    "truncated": (wav(wav_header(announced=6400)), ["u3.wav", "truncated", "1600 of the 3200"]),
    "cut off in its header": (wav(wav_header()[:20]), ["u3.wav", "header"]),
    "float": (wav(wav_header(bits=32, audio_format=3)), ["u3.wav", "16 bit PCM", "format: 3"]),
    "8 bit": (wav(wav_header(bits=8)), ["u3.wav", "8 bit"]),
    "no samples": (wav(wav_header(announced=0, content=b"")), ["u3.wav", "no samples"]),
    "no bytes": (wav(b""), ["u3.wav", "not a wav"]),
    "a text": (wav(b"this is no sound, but a text of some length"), ["u3.wav", "not a wav", "RIFF"]),
    "sample rate 0": (wav(wav_header(rate=0)), ["u3.wav", "0 samples per second"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line(folder, capsys, case):
    spoil, expected = BAD_DATA[case]
    spoil(folder)
    code, _, said = run_demo(capsys, folder)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    for part in expected:
        assert part in said


def test_missing_folder(tmp_path, capsys):
    code, _, said = run_demo(capsys, tmp_path / "nowhere")
    assert code == 2 and said.startswith("error: ") and "nowhere: no such folder" in said


def test_file_instead_of_folder(folder, capsys):
    code, _, said = run_demo(capsys, folder / "u1.wav")
    assert code == 2 and "u1.wav: not a folder" in said


@pytest.mark.parametrize(
    "option",
    [("--lr", "nan"), ("--epochs", "0"), ("--clip-value", "-1"), ("--threads", "x")]
    + [("--device", name) for name in ("gpu", "meta", "cuda:99")],
)
def test_bad_options(folder, capsys, option):
    code, _, said = run_demo(capsys, folder, *option)
    assert code == 2 and option[0] in said and repr(option[1]) in said and "Traceback" not in said


def test_no_data_at_all_says_what_was_tried(tmp_path, capsys, monkeypatch):
    def fail(folder, voices):
        raise speech_clips.SpeechDataError("no network")

    monkeypatch.setattr(speech_clips, "fetch_recordings", fail)
    monkeypatch.setattr(speech_clips, "synthesise", fail)
    assert speech_demo.main(["--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "recorded digits: no network; synthetic digits: no network" in said and "--data DIR" in said


def test_half_a_fetch_does_not_count(tmp_path, monkeypatch):
    def break_off(folder, voices):
        for voice in voices[:3]:
            with speech_clips._appearing_at_once(folder / voice):
                pass
        with speech_clips._appearing_at_once(folder / voices[3]):
            raise OSError("the network went away")

    monkeypatch.setattr(speech_clips, "fetch_recordings", break_off)
    monkeypatch.setattr(speech_clips, "synthesise", break_off)
    with pytest.raises(speech_clips.SpeechDataError, match="the network went away"):
        speech_clips.find_clips(tmp_path)
    assert len(list((tmp_path / "recorded").iterdir())) == 3


@pytest.mark.parametrize("lr", ["0.03", "1e30"])
def test_tiny_run(folder, capsys, lr):
    """At the absurd learning rate all arms but one end in NaN, which has to pass through table, picture and JSON."""
    code, out, said = run_demo(capsys, folder, "--epochs", "2", "--lr", lr)
    assert code == 0, said
    assert "12 utterances" in out and "agree in every bit" in out
    for arm in ("no clipping", "Python loop", "fastclip"):
        assert f"\n{arm} " in out
    results = folder.parent / "out"
    assert (results / "speech_demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((results / "speech_demo.json").read_text(), parse_constant=pytest.fail)
    rows = {row["arm"]: row for row in report["results"]}
    assert len(rows) == 5
    limited = next(row for arm, row in rows.items() if arm.startswith("change <= 3 %, lr "))
    assert limited["final_loss"] is not None and limited["lr"] == pytest.approx(10 * float(lr))
    assert rows["fastclip"]["wer_percent"] == rows["Python loop"]["wer_percent"]
    steps = json.loads((results / "speech_demo_steps.json").read_text(), parse_constant=pytest.fail)
    assert steps["curves"]["fastclip"]["loss"] == steps["curves"]["Python loop"]["loss"]
    assert report["settings"]["identical_bits"] is True
    assert report["settings"]["device"] == "cpu"
    assert report["data"]["kind"] == "own"


def test_the_readme_shows_the_recorded_run():
    """Clip, learning rate and error rate of each arm; the loop and fastclip are one row."""
    report = json.loads((ROOT / "docs/study/speech_demo.json").read_text())
    assert report["settings"]["identical_bits"] and not report["dirty"] and report["commit"]
    table = (ROOT / "README.md").read_text().split("<!-- demo -->\n")[1].split("\n<!--")[0].splitlines()[2:]
    said = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table]
    rows = {row["arm"]: row for row in report["results"]}
    assert rows["fastclip"]["wer_percent"] == rows.pop("Python loop")["wer_percent"]
    clips = {"no clipping": "none", "fastclip": "clip_value=0.01", "change": "max_relative_change=0.03"}
    wanted = [(clip, f"{row['lr']:g}", f"{row['wer_percent']:.1f} %")
              for row in rows.values() for arm, clip in clips.items() if row["arm"].startswith(arm)]  # fmt: skip
    assert sorted((clip.strip("`"), lr, wer) for clip, lr, wer in said) == sorted(wanted)
    assert report["settings"]["clip_value"] == 0.01 and "recorded" in report["data"]["caption"]


def test_on_any_device(folder, capsys, device):
    code, out, said = run_demo(capsys, folder, "--epochs", "2", "--device", device)
    assert code == 0, said
    assert ("agree in every bit" in out) == (device == "cpu")


def test_a_gpu_is_the_default_if_there_is_one():
    assert speech_demo.parse_arguments([]).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_where_bits_may_differ_a_difference_is_no_error(folder, capsys, monkeypatch):
    why_not_equal = lockstep.why_not_equal
    monkeypatch.setattr(lockstep, "why_not_equal", lambda device: why_not_equal(torch.device("cuda")))
    monkeypatch.setattr("fastclip.SGD", lambda params, lr, momentum, **clip: torch.optim.SGD(params, lr, momentum))
    code, out, _ = run_demo(capsys, folder, "--epochs", "2")
    assert code == 0 and "Bits are compared on the CPU only" in out


def test_a_difference_is_an_error(folder, capsys, monkeypatch):
    monkeypatch.setattr("fastclip.SGD", lambda params, lr, momentum, **clip: (
        torch.optim.SGD(params, lr, momentum)))  # fmt: skip
    code, _, said = run_demo(capsys, folder, "--epochs", "2")
    assert code == 1
    assert "error: the Python loop and fastclip differ: parameter conv.weight" in said


def test_ctrl_c(folder, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speech_demo, "train", interrupt)
    code, _, said = run_demo(capsys, folder)
    assert code == 130 and "Stopped" in said


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_wav_at_other_rates(tmp_path, rate):
    write_wav(tmp_path / "a.wav", tone(rate=rate), rate)
    samples = read_wav(tmp_path / "a.wav", 16000)
    assert len(samples) == pytest.approx(0.8 * 16000, abs=1)
    middle = slice(1000, 11000)  # the ends ring
    torch.testing.assert_close(samples[middle], tone()[middle], atol=2e-3, rtol=0)


def test_stereo_is_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", torch.stack([tone(), torch.zeros(12800)], 1))
    torch.testing.assert_close(read_wav(tmp_path / "a.wav", 16000), tone() / 2, atol=1e-4, rtol=0)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert resample(tone(hertz=6000), 16000, 8000).abs().max() < 0.01


@pytest.mark.parametrize(
    "reference, hypothesis, distance",
    [
        ("", "", 0),
        ("12", "", 2),
        ("", "123", 3),
        ("kitten", "sitting", 3),
        ("1234", "1334", 1),
        ("1234", "2341", 2),
        (["a", "bc"], ["a", "b", "c"], 2),
    ],
)
def test_edit_distance(reference, hypothesis, distance):
    assert edit_distance(reference, hypothesis) == distance


def test_word_error_rate():
    assert word_error_rate([["a", "b"], ["c", "d"]], [["a"], ["c", "x", "y"]]) == 75  # of 4: one missing, two wrong


def test_ctc_decoding():
    best = torch.tensor([1, 1, 0, 1, 2, 2, 0, 2])
    log_probs = torch.nn.functional.one_hot(best, 3).float().unsqueeze(1)
    assert greedy_decode(log_probs, torch.tensor([8]), ["a", "b"]) == ["aabb"]
    assert greedy_decode(log_probs, torch.tensor([4]), ["a", "b"]) == ["aa"]
    assert outputs_needed("aabb") == 6
