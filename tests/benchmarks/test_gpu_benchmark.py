"""The benchmark of a GPU, rehearsed on the CPU: all of it but events, graphs and the times themselves."""

import json

import pytest
import torch

from benchmarks import gpu, profile
from benchmarks.core import agreement, contenders, devices, gpu_rows, record, rows, timing
from benchmarks.core.problem import Problem
from benchmarks.report import documents as report
from benchmarks.report import formats
from benchmarks.report import gpu as gpu_report
from tests.cuda import exercise
from tests.support.project import ROOT


def rehearse(monkeypatch, out, *arguments):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    return gpu.main(["--device", "cpu", "--rounds", "3", "--out", str(out), *arguments])


def test_a_rehearsal_runs_every_case_and_goes_into_no_document(monkeypatch, capsys, tmp_path):
    assert rehearse(monkeypatch, tmp_path, "--model", "dnn") == 0
    assert "rehearsal" in capsys.readouterr().out
    path = tmp_path / "gpu.json"
    found = json.loads(path.read_text())
    assert (found["rehearsal"], found["gpu"], found["left_out"], found["failed"]) == (True, None, [], [])
    assert len(found["agreement"]) == len(found["cases"]) == 4
    for row in found["cases"]:
        assert row["dtype"] == "float32" and row["kernels"] is None
        assert row["us_per_step"].keys() == row["host_us"].keys() == set(contenders.CONTENDERS)
        assert len(row["device_us"]["fastclip"]["samples"]) == 3
        assert ("norm_vs_value" in row) == (row["clip"] == "norm")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:gpu -->\nold\n<!-- /benchmark:gpu -->\n")
    assert report.main([str(path)]) == 0
    assert "| dnn | float32 | norm 1 | 0.9 |" in capsys.readouterr().out
    assert report.main([str(path), "--update", str(readme)]) == 1
    assert "rehearsal" in capsys.readouterr().err and "old" in readme.read_text()


def test_bfloat16_agrees_and_has_half_the_bytes(monkeypatch):
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    monkeypatch.setattr(rows, "LARGE", 1)
    # torch's fused SGD without momentum leaves bfloat16 parameters as they are in its CPU kernel's vectors (2.13).
    monkeypatch.setitem(contenders.CONTENDERS, "fused", contenders.foreach)
    problem = Problem("tiny", [(50, 30), (7,)], dtype=torch.bfloat16)
    for clip in contenders.CLIPS:
        for rule in contenders.RULES["sgd"]:
            rows.agreement_row(problem, clip, rule)
    row = gpu_rows.measure(problem, "norm", contenders.RULES["sgd"][1], devices.Cpu(), 2)
    assert (row["dtype"], row["floor_bytes_per_parameter"]) == ("bfloat16", 12)
    assert "of_floor" in row


@pytest.mark.parametrize("clip", contenders.CLIPS)
@pytest.mark.parametrize("name", ["loop", "fastclip"])
def test_in_16_bits_a_clip_that_is_not_applied_is_a_disagreement(name, clip, monkeypatch):
    def unclipped(params, clip, rule):
        optimizer = rule.torch_class(params, **rule.settings)
        return optimizer, optimizer.step

    problem = Problem("tiny", [(100, 100)], dtype=torch.bfloat16)
    monkeypatch.setitem(contenders.CONTENDERS, name, unclipped)
    with pytest.raises(agreement.Disagreement):
        agreement.check(problem, contenders.CLIPS[clip], contenders.RULES["sgd"][0])


def test_a_model_whose_contenders_disagree_is_not_timed(monkeypatch, capsys, tmp_path):
    def disagree(*_):
        raise agreement.Disagreement("planted")

    monkeypatch.setattr(agreement, "check", disagree)
    monkeypatch.setattr(gpu_rows, "measure", lambda *_: pytest.fail("timed"))
    assert rehearse(monkeypatch, tmp_path, "--model", "dnn") == 1
    assert "dnn, value, momentum 0: planted" in capsys.readouterr().err
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["cases"] == [] and found["failed"][0]["case"] == "dnn float32"


def test_a_case_that_fails_stops_no_other(monkeypatch, tmp_path):
    measured = gpu_rows.measure

    def fail_once(problem, clip, rule, *rest):
        if (clip, rule.title) == ("value", "momentum 0.9"):
            raise RuntimeError("planted")
        return measured(problem, clip, rule, *rest)

    monkeypatch.setattr(gpu_rows, "measure", fail_once)
    assert rehearse(monkeypatch, tmp_path, "--model", "dnn") == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["cases"]) == 3
    assert found["failed"] == [{"case": "dnn float32, value, momentum 0.9", "error": "RuntimeError: planted"}]
    assert "Failed: dnn float32, value, momentum 0.9." in report.markdown(found)


def test_cases_that_the_time_does_not_reach_are_named(monkeypatch, tmp_path):
    assert rehearse(monkeypatch, tmp_path, "--model", "dnn", "--seconds", "0") == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["cases"] == [] and len(found["left_out"]) == 4
    assert "Left out, as the time was up: dnn float32, value, momentum 0;" in report.markdown(found)


def test_a_graph_that_can_not_be_captured_is_said(monkeypatch):
    class NoGraphs(devices.Cpu):
        def graph(self, step, steps):
            raise RuntimeError("no capture\nand more")

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-6)
    row = gpu_rows.measure(Problem("tiny", [(5,)]), "value", contenders.RULES["sgd"][0], NoGraphs(), 2)
    assert row["no_graph"] == {name: "no capture" for name in contenders.CONTENDERS}
    assert len(row["device_us"]["fastclip"]["samples"]) == 2


def test_graphs_hold_as_many_steps_as_the_times_are_divided_by():
    steps_taken = []

    def clock(step, steps):
        for _ in range(steps):
            step()
        return 60.0 * steps

    replay = devices.Cpu().graph(lambda: steps_taken.append(1), 20)
    assert timing.Timer(replay, clock, steps=3, inside=20)() == 3.0
    assert len(steps_taken) == 60
    for tensors, inside in {4: 20, 50: 4, 600: 1}.items():
        timer = gpu_rows.device_timer({"tensors": tensors, "no_graph": {}}, devices.Cpu(), "loop", lambda: None)
        assert timer.inside == inside


def test_rows_by_hand():
    row = {"tensors": 6, "parameters": 100_000_000, "clip": "norm", "momentum": 0.0, "dtype": "float32", "no_graph": {}}
    samples = {(kind, name): [8.0, 8.0] for kind in ("step", "device", "host") for name in contenders.CONTENDERS}
    samples |= {("device", "fastclip"): [1e-3, 2e-3], ("device", "fused"): [3e-3, 3e-3]}
    samples |= {("device", "value"): [0.5e-3, 0.5e-3], ("copy", ""): [1e-3, 1e-3]}
    found = gpu_rows.evaluate(row, samples, copied=2e9)  # 2 TB/s: 16 bytes for each of 100M take 0.8 ms
    assert found["of_floor"]["samples"] == [0.8, 0.4]
    assert found["copy_gb_per_s"]["median"] == 2000
    assert found["device_vs_fused"]["samples"] == [3.0, 1.5]
    assert found["norm_vs_value"]["samples"] == [2.0, 4.0]
    assert gpu_rows.in_l2(row, {"l2_bytes": 800_000_000}) is True
    assert gpu_rows.in_l2(row, {"l2_bytes": 799_999_999}) is False
    assert gpu_rows.in_l2(row, None) is None


def test_the_summary_has_a_row_for_each_case_of_plain_sgd():
    ratios = {"device_vs_fused": {"median": 2.04}, "host_vs_loop": {"median": 123.4}}
    ratios |= {"device_us": {"fastclip": {"median": 5.512}}, "host_us": {"fastclip": {"median": 12.34}}}
    row = {"model": "dnn", "dtype": "float32", "clip": "value", "momentum": 0.0, "kernels": ["step_kernel"], **ratios}
    norm = {"clip": "norm", "norm_vs_value": {"median": 1.1}, "of_floor": {"median": 0.957}, "kernels": None}
    lines = gpu_report.summary({"cases": [row, row | {"momentum": 0.9}, row | norm]})
    assert lines[1:] == [
        ["dnn", "float32", "value", "5.51", "", "2.0×", "", "12.3", "123×", "1"],
        ["dnn", "float32", "norm", "5.51", "96 %", "2.0×", "1.10×", "12.3", "123×", ""],
    ]
    assert len(lines[0]) == len(lines[1])


def test_the_page_s_gpu_table_is_that_of_the_committed_results_or_says_that_there_are_none():
    begin, end = report.markers("benchmark:gpu")
    held = (ROOT / "docs/performance.md").read_text().split(begin)[1].split(end)[0].strip()
    path = ROOT / "benchmarks/results/gpu.json"
    if path.exists():
        assert held == report.markdown(json.loads(path.read_text()))
    else:
        assert held == "**No GPU number has been measured yet.**"


def test_the_commit_may_be_told_where_there_is_no_git(monkeypatch):
    def no_git(*_):
        raise OSError

    monkeypatch.setattr(record, "git", no_git)
    monkeypatch.delenv("FASTCLIP_COMMIT", raising=False)
    assert formats.commit(record.revision()) == "unknown"
    monkeypatch.setenv("FASTCLIP_COMMIT", "0123456789abcdef")
    assert formats.commit(record.revision()) == "0123456789 (as told)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_commands_say_so(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert profile.main([]) == 2
    assert exercise.main([]) == 2
    assert capsys.readouterr().err.count("sees no GPU") == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that this torch can use")
def test_events_and_graphs_time_what_they_should(monkeypatch):
    device = devices.Cuda()
    counter = torch.zeros((), device="cuda")
    counter.add_(1).zero_()  # before a capture, its kernel has to be loaded
    replay = device.graph(lambda: counter.add_(1), 3)
    assert counter.item() == 0
    assert device.block(replay, 2) > 0 and device.host_block(replay, 1) > 0
    assert counter.item() == 9
    assert device.describe()["name"]
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-4)
    row = gpu_rows.measure(
        Problem("tiny", [(50, 30), (7,)], device="cuda"), "norm", contenders.RULES["sgd"][1], device, 2
    )
    assert row["no_graph"] == {} and row["in_l2"] is True


def test_the_exercise_finds_a_wrong_step(monkeypatch, capsys):
    few = [case for case in exercise.cases(small=True) if case[0].startswith(("float32, norm", "float32, value"))][:4]
    monkeypatch.setattr(exercise, "cases", lambda small: few)
    assert exercise.main(["--device", "cpu"]) == 0
    assert "exercise: 4 cases on cpu, 0 differ" in capsys.readouterr().out
    views = exercise.views
    monkeypatch.setattr(exercise, "views", lambda tensor, device: views(tensor * 1.001, device))
    assert exercise.main(["--device", "cpu"]) == 1
    assert "differs: float32, value, plain: parameter" in capsys.readouterr().out


def test_the_steps_for_a_profiler_run(capsys):
    assert profile.main(["--device", "cpu", "--model", "dnn", "--clip", "norm", "--steps", "2"]) == 0
    assert "2 steps of fastclip: dnn, norm clip" in capsys.readouterr().out
