"""Two runs in one folder would write over each other: the second is refused."""

import pytest

from effnet_fast import cli


def test_a_second_run_is_refused_until_the_first_is_gone(runs, small, capsys, monkeypatch):
    monkeypatch.setattr("effnet_fast.run.resume.PATIENCE", 0.2)
    first = runs.train("run", "--num_epochs 500")
    first.wait_for("step 1/")
    line = f"{small} --save_dir {runs.folder} --run_name run --num_epochs 500 --time_budget 0.01"
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: another run is at work in {runs.folder}/run: ")
    assert said.count("\n") == 1
    assert first.process.poll() is None
    first.kill()  # -9: nothing can be tidied up, and the lock is free all the same
    with pytest.raises(SystemExit) as done:
        cli.main(line.split())
    assert done.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_of_two_runs_started_at_once_one_is_refused(runs, attempt):
    both = [runs.train("run", "--num_epochs 300 --time_budget 25") for _ in range(2)]
    statuses = sorted(run.end() for run in both)
    assert statuses == [0, 2]
    assert sum("another run is at work" in run.said for run in both) == 1
