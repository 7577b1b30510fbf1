"""bench_gpu.py runs where there is no GPU, and says exactly what it could not try."""

import json

import bench_gpu
import pytest

SKIPPED = {
    "machine": ["card, capability", "cuDNN attention is off"],
    "attention": ["decoding: kernels", "packed: kernels"],
    "reference": ["GPU memory taken"],
    "decoding": ["4 x 650, model: GPU ms, launches, waits", "4 x 650, choosing: GPU ms, launches, waits",
                 "waits of a step of sample", "sample over the card's bound (asked: 0.5)"],
    "update": ["waits of a micro-batch"],
    "whole_run": ["rollout: allocated over planned", "update: allocated over planned",
                  "reserved GiB, retried allocations"],
    "trl": ["seconds a step over ours (asked: 2)"],
}


def rows_of(path):
    return [bench_gpu.Row(**row) for row in json.loads(path.read_text())]


def test_a_dry_run_tries_everything_that_a_cpu_can_and_lists_the_rest(tmp_path, capsys):
    assert bench_gpu.main(["--dry-run", "--out", str(tmp_path / "rows.json")]) == 0, capsys.readouterr().out
    rows, skipped = rows_of(tmp_path / "rows.json"), {}
    for row in rows:
        if row.skipped:
            assert row.skipped == "needs CUDA"
            skipped.setdefault(row.check, []).append(row.name)
    assert skipped == SKIPPED
    tried = {row.check for row in rows if row.holds}
    assert tried == {"attention", "sampler", "optimizer", "reference", "whole_run", "out_of_memory"}
    assert capsys.readouterr().out.count("\n") == len(rows)


def test_a_check_that_fails_is_a_row_and_an_exit_code_and_the_next_goes_on(tmp_path, monkeypatch):
    def failing(at):
        yield bench_gpu.Row("measured before", 1.5)
        raise RuntimeError("out of luck")

    monkeypatch.setitem(bench_gpu.CHECKS, "machine", failing)
    out = tmp_path / "rows.json"
    assert bench_gpu.main(["--dry-run", "--out", str(out), "--only", "machine", "optimizer"]) == 1
    found = {(row.check, row.name): (row.value, row.holds) for row in rows_of(out)}
    assert found["machine", "measured before"] == (1.5, None)
    assert found["machine", "ran"] == ("RuntimeError: out of luck", False)
    assert found["optimizer", "masters are the library's, offload on"] == (True, True)


def test_without_a_gpu_only_a_dry_run_starts(capsys):
    if bench_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "--dry-run" in capsys.readouterr().err
