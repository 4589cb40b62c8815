"""The benchmark compares like with like, and reports what it measured. Nothing here is timed."""

import copy
import json
import math
from collections import Counter

import pytest
import torch

from tests.support.project import ROOT

pytest.importorskip("tqdm", reason="the benchmark shows its progress with tqdm: pip install -r requirements-demo.txt")

import benchmarks.__main__ as command_line  # noqa: E402
from benchmarks import cpu  # noqa: E402
from benchmarks.core import agreement, contenders, rows, timing  # noqa: E402
from benchmarks.core.problem import Problem, is_normal  # noqa: E402
from benchmarks.report import cpu as cpu_report  # noqa: E402
from benchmarks.report import documents as report  # noqa: E402

SHAPES = [(5, 3), (7,), (), (1, 33)]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


RULES = {rule.title: rule for case_rules in contenders.RULES.values() for rule in case_rules}
PLAIN, MOMENTUM = contenders.RULES["sgd"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", contenders.CLIPS)
def test_contenders_agree(clip, rule):
    problem = Problem("tiny", SHAPES)
    deviations = agreement.check(problem, contenders.CLIPS[clip], RULES[rule], (1, 2))
    assert deviations["fastclip"] < 1e-6
    if clip == "value" and RULES[rule] in (PLAIN, MOMENTUM):
        assert deviations["fastclip"] == agreement.value_tolerance("fastclip", problem) == 0


def planted(params, clip, rule):
    """One element of the last step's result is off by one bit."""
    optimizer, step = contenders.one_pass(params, clip, rule)

    def wrong_step():
        step()
        p = params[0].data.view(-1)
        p[3] = torch.nextafter(p[3], torch.tensor(math.inf))

    return optimizer, wrong_step


def test_one_wrong_bit_is_a_disagreement(monkeypatch):
    monkeypatch.setitem(contenders.CONTENDERS, "fastclip", planted)
    with pytest.raises(agreement.Disagreement, match=r"fastclip: parameter 0 of shape \(5, 3\)"):
        agreement.check(Problem("tiny", SHAPES), contenders.CLIPS["value"], MOMENTUM)


def test_one_wrong_bit_of_a_state_is_a_disagreement(monkeypatch):
    """The last bits of Adam's parameters may differ, those of its averages may not."""

    def planted(params, clip, rule):
        optimizer, step = contenders.one_pass(params, clip, rule)

        def wrong_step():
            step()
            average = optimizer.state[params[0]]["exp_avg"].view(-1)
            average[3] = torch.nextafter(average[3], torch.tensor(math.inf))

        return optimizer, wrong_step

    monkeypatch.setitem(contenders.CONTENDERS, "fastclip", planted)
    with pytest.raises(agreement.Disagreement, match=r"fastclip: exp_avg 0 of shape \(5, 3\)"):
        agreement.check(Problem("tiny", SHAPES), contenders.CLIPS["value"], RULES["AdamW"])


def unclipped(params, clip, rule):
    optimizer = rule.torch_class(params, **rule.settings)
    return optimizer, optimizer.step


@pytest.mark.parametrize("rule", ["momentum 0", "AdamW"])
@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_a_clip_that_is_not_applied_is_a_disagreement(name, rule, monkeypatch):
    problem = Problem("tiny", [(100, 100)])
    monkeypatch.setitem(contenders.CONTENDERS, name, unclipped)
    for clip in contenders.CLIPS.values():
        if not (name == "loop" and clip[0] == "norm"):  # there the loop is wrong in both types, and the others differ
            with pytest.raises(agreement.Disagreement):
                agreement.check(problem, clip, RULES[rule])


def test_lost_momentum_and_nan_are_disagreements():
    good = {"parameter": [torch.ones(2)], "momentum_buffer": [torch.ones(2)]}
    with pytest.raises(agreement.Disagreement, match="0 momentum_buffer tensors instead of 1"):
        agreement.compare("x", good | {"momentum_buffer": []}, good, 1.0)
    with pytest.raises(agreement.Disagreement, match="nan"):
        agreement.compare("x", good | {"momentum_buffer": [torch.tensor([1.0, math.nan])]}, good, 1.0)


def test_the_command_stops_at_a_disagreement(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(contenders.CONTENDERS, "fastclip", planted)
    monkeypatch.setattr(cpu, "timed_rows", lambda *_: pytest.fail("timed"))
    assert cpu.main(["--model", "dnn", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "dnn, value, momentum 0: fastclip: parameter 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_report_reads(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    monkeypatch.setattr(rows, "LARGE", 1)
    assert cpu.main(["--model", "dnn", "--threads", "1", "--rounds", "6", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert [(row["clip"], row["momentum"]) for row in found["cases"]] == [
        (clip, momentum) for clip in contenders.CLIPS for momentum in (0.0, 0.9)
    ]
    # Half of the rounds, as the model counts as large.
    assert [len(row["us_per_step"]["fastclip"]["samples"]) for row in found["cases"]] == 4 * [3]
    assert [row["bytes_per_parameter"] for row in found["cases"]] == [12, 20, 16, 24]
    assert (tmp_path / "cpu.png").stat().st_size > 0
    capsys.readouterr()
    assert report.main([str(tmp_path / "cpu.json")]) == 0
    assert capsys.readouterr().out.count("\n| dnn |") == 4


def test_adamw_is_a_case_of_its_own(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    monkeypatch.setattr(rows, "LARGE", 1)
    arguments = ["--model", "dnn", "--cases", "adamw", "amsgrad", "--threads", "1", "--rounds", "2"]
    assert cpu.main([*arguments, "--out", str(tmp_path), "--name", "cpu-adamw"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cpu-adamw.json", "cpu-adamw.png"}
    found = json.loads((tmp_path / "cpu-adamw.json").read_text())
    assert [(row["clip"], row["rule"], row["bytes_per_parameter"]) for row in found["cases"]] == [
        ("value", "AdamW", 28),
        ("value", "AdamW amsgrad", 36),
        ("norm", "AdamW", 32),
        ("norm", "AdamW amsgrad", 40),
    ]
    texts = report.tables({"cpu-adamw": found})
    assert "| model | clip | rule |" in texts["benchmark:cpu-adamw"]
    assert "| dnn | norm 1 | AdamW amsgrad |" in texts["benchmark:cpu-adamw"]
    assert "Medians; rule AdamW / AdamW amsgrad." in texts["benchmark:cpu-adamw-summary"]


def test_rules_without_all_contenders_are_timed_against_those_there_are(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("lion_pytorch")
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    arguments = ["--model", "dnn", "--cases", "lion", "adagrad", "--threads", "1", "--rounds", "1"]
    assert cpu.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cpu.json").read_text())
    timed = {row["rule"]: row["us_per_step"].keys() - {"host"} for row in found["cases"]}
    assert timed == {"Lion": {"loop", "fastclip"}, "Adagrad": {"loop", "foreach", "fused", "fastclip"}}
    assert "foreach" in capsys.readouterr().out


def test_statistics_by_hand():
    assert timing.summary([5.0]) == {"median": 5.0, "p10": 5.0, "p90": 5.0}
    assert timing.summary([11.0 - i for i in range(11)]) == {"median": 6.0, "p10": 2.0, "p90": 10.0}
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert timing.fastest({"slow": [3.0, 3.0, 1.0], "fast": [2.0, 2.0, 9.0]}) == "fast"


def test_every_actor_runs_its_steps_in_every_round():
    counts = {"a": 0, "b": 0}

    def actor(name):
        def step():
            counts[name] += 1

        return step

    timers = {name: timing.Timer(actor(name), steps=steps) for name, steps in {"a": 2, "b": 5}.items()}
    samples = timing.rounds(timers, 3)
    assert counts == {"a": 6, "b": 15}
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_speed_ups_and_limit_by_hand():
    samples = {"loop": [4e-3, 9e-3], "foreach": [3e-3, 9e-3], "fused": [2e-3, 6e-3], "fastclip": [1e-3, 2e-3]}
    row = {"tensors": 10, "parameters": 1_000_000, "clip": "norm", "momentum": 0.9}
    found = cpu.evaluate(row, samples | {"host": [1e-6, 2e-6], "limit": [0.8e-3, 1e-3]})
    assert found["vs_loop"]["samples"] == [4.0, 4.5]
    assert (found["best_of_torch"], found["vs_best_of_torch"]["samples"]) == ("fused", [2.0, 3.0])
    assert found["us_per_step"]["fastclip"]["median"] == 1500
    assert found["host_ns_per_tensor"]["samples"] == [100.0, 200.0]
    assert found["limit_gb_per_s"]["samples"] == [30.0, 24.0]  # 24 bytes for each of 1M elements
    assert found["of_limit"]["samples"] == [0.8, 0.5]


def test_normal_numbers():
    assert is_normal([torch.tensor([0.0, 1.0, -1e-37])])
    for bad in (1e-39, math.inf, math.nan):
        assert not is_normal([torch.tensor([1.0, bad])])


def summary(median, p10, p90):
    return {"median": median, "p10": p10, "p90": p90, "samples": []}


RESULTS = {
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "fastclip": "0.1.0", "compiler": "gcc", "capability": "AVX2"},
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2025-01-31T12:00:00+00:00",
    "command": "python -m benchmarks cpu",
    "cases": [
        {
            "model": "conformer-m",
            "tensors": 480,
            "parameters": 24_367_104,
            "clip": "value",
            "limit": 0.01,
            "momentum": 0.9,
            "threads": 1,
            "us_per_step": {"fastclip": summary(12345.6, 12000.0, 13000.0)},
            "vs_loop": summary(2.04, 1.9, 2.2),
            "best_of_torch": "fused",
            "vs_best_of_torch": summary(1.5, 1.4, 1.6),
            "of_limit": summary(0.957, 0.9, 1.0),
        },
        {
            "model": "dnn",
            "tensors": 4,
            "parameters": 37_184,
            "clip": "norm",
            "limit": 1.0,
            "momentum": 0.0,
            "threads": 2,
            "us_per_step": {"fastclip": summary(3.456, 3.0, 14.04)},
            "vs_loop": summary(123.4, 99.0, 130.0),
            "best_of_torch": "loop",
            "vs_best_of_torch": summary(20.0, 19.0, 21.0),
        },
    ],
}

BEGIN, END = report.markers("benchmark:cpu")
TABLES = """\
Some CPU, 2 cores; torch 2.13.0, Python 3.11.7, fastclip 0.1.0 (gcc, AVX2); commit 0123456789, 2025-01-31; \
`python -m benchmarks cpu`. Medians (10th–90th percentile of the rounds). Limit: the time that memory takes \
for the same arrays and nothing else, in the same round.

Models: conformer-m, 480 tensors, 24.4M; dnn, 4 tensors, 37K.

**1 thread**

| model | clip | momentum | µs per step | vs loop | vs best of torch | of the limit |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| conformer-m | value 0.01 | 0.9 | 12,346 (12,000–13,000) | 2.0× (1.9–2.2) | 1.5× (1.4–1.6) fused | 96 % (90–100) |

**2 threads**

| model | clip | momentum | µs per step | vs loop | vs best of torch | of the limit |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| dnn | norm 1 | 0 | 3.46 (3–14) | 123× (99.0–130) | 20.0× (19.0–21.0) loop |  |"""


def test_report_by_hand():
    assert report.markdown(RESULTS) == TABLES
    changed = copy.deepcopy(RESULTS) | {"commit": None, "dirty": True}
    assert "commit unknown with changes" in report.markdown(changed)


SUMMARY = """\
Some CPU, 2 cores; torch 2.13.0, Python 3.11.7, fastclip 0.1.0 (gcc, AVX2); commit 0123456789, 2025-01-31; \
`python -m benchmarks cpu`. Medians; momentum 0.9 / 0.

| model | clip | 1 thread: vs loop | vs best of torch | 2 threads: vs loop | vs best of torch |
| --- | --- | ---: | ---: | ---: | ---: |
| conformer-m, 24.4M | value 0.01 | 2.0× | 1.5× |  |  |
| dnn, 37K | norm 1 |  |  | 123× | 20.0× |"""


def test_report_updates_what_is_between_the_markers(tmp_path):
    results, readme, both = tmp_path / "cpu.json", tmp_path / "README.md", tmp_path / "both.md"
    results.write_text(json.dumps(RESULTS))
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    short, end_of_short = report.markers("benchmark:cpu-summary")
    both.write_text(f"{short}\n{end_of_short}\n{BEGIN}\n{END}\n")
    for _ in range(2):
        assert report.main([str(results), "--update", str(readme), str(both)]) == 0
        assert readme.read_text() == f"before\n{BEGIN}\n{TABLES}\n{END}\nafter\n"
        assert both.read_text() == f"{short}\n{SUMMARY}\n{end_of_short}\n{BEGIN}\n{TABLES}\n{END}\n"


def test_documents_quote_the_committed_results():
    texts = report.tables({path.stem: json.loads(path.read_text()) for path in report.committed()})
    quoted = Counter()
    for document in (ROOT / "README.md", ROOT / "docs/performance.md"):
        text = document.read_text()
        for name in (name for name in texts if report.markers(name)[0] in text):
            assert report.replaced(text, {name: texts[name]}) == text, f"{document.name} has another {name}"
            quoted[name] += 1
    expected = {f"benchmark:{path.stem}" for path in report.committed()}
    expected |= {"speed", "benchmark:cpu-summary", "benchmark:cpu-large-summary"}
    assert expected <= set(quoted) and set(quoted.values()) == {1}
    assert report.markers("speed")[0] in (ROOT / "README.md").read_text()


def test_the_table_of_speed_by_hand():
    def row(model, clip, rule, threads=1, **ratios):
        found = {"model": model, "parameters": 86_400, "clip": clip, "threads": threads, **rule}
        return found | {name: {"median": value} for name, value in ratios.items()}

    momentum, adamw = {"momentum": 0.9}, {"rule": "AdamW"}
    sgd_rows = [
        row("tiny-600", "value", {"momentum": 0.0}, vs_loop=0.1, vs_best_of_torch=0.1),
        row("tiny-600", "value", momentum, vs_loop=58.44, vs_best_of_torch=17.8),
        row("tiny-600", "value", momentum, threads=2, vs_loop=0.1, vs_best_of_torch=0.1),
        row("dense-100m", "value", momentum, vs_loop=2.3, vs_best_of_torch=2.0),
    ]
    adamw_rows = [
        row("gru-ctc", "norm", adamw, vs_loop=5.3, vs_best_of_torch=2.3),
        row("conformer-m", "norm", adamw, vs_loop=123.4, vs_best_of_torch=1.6),
    ]
    table = cpu_report.speed([{"cases": sgd_rows}, {"cases": adamw_rows}])
    assert (
        table
        == """\
| model | optimizer, clip | vs Python loop | vs best of torch |
| --- | --- | ---: | ---: |
| 600 tensors of 144 (86K) | SGD + momentum, value | 58.4× | 17.8× |
| GRU-CTC (86K) | AdamW, norm | 5.3× | 2.3× |
| Conformer-M (86K) | AdamW, norm | 123× | 1.6× |
| 6 matrices of 4,096² (86K) | SGD + momentum, value | 2.3× | 2.0× |"""
    )
    assert cpu_report.speed([{"cases": sgd_rows}]) is None


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", None])
def test_report_without_markers_or_file_says_so(text, tmp_path, capsys):
    results, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    results.write_text(json.dumps(RESULTS))
    if text is not None:
        readme.write_text(text)
    assert report.main([str(results), "--update", str(readme)]) == 1
    assert "README.md" in capsys.readouterr().err
    assert text is None or readme.read_text() == text


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_each_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {command} [-h]")


def test_the_command_line_lists_its_commands_and_refuses_others(capsys):
    for arguments, code, said in ((["--help"], 0, "gpu-session"), ([], 2, "required"), (["gpus"], 2, "invalid choice")):
        with pytest.raises(SystemExit) as stopped:
            command_line.main(arguments)
        assert stopped.value.code == code
        assert said in "".join(capsys.readouterr())


def test_the_readme_of_the_benchmarks_names_each_command():
    readme = (ROOT / "benchmarks/README.md").read_text()
    assert all(f"`{command}" in readme for command in command_line.COMMANDS)
