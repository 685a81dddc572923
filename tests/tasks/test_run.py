import json
import os
import signal
import time

import pytest
import yaml

from tests.tasks.tiny import in_child, make_run
from zoo.errors import UserError
from zoo.files import write_file
from zoo.tasks.run import Run


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "ZOO_RUN"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("ZOO_RUN", None)


def test_a_run_holds_the_recipe_its_resolved_form_and_its_state(tmp_path):
    run = Run.create(tmp_path, text="# lr=1\na: ${b}\n", config={"a": 1, "b": [2]}, hash="abc")
    assert run.folder == tmp_path / "0001"
    assert (run.folder / "recipe.yaml").read_text() == "# lr=1\na: ${b}\n"
    assert yaml.safe_load((run.folder / "checkpoints" / "config.yaml").read_text()) == {"a": 1, "b": [2]}
    assert json.loads((run.folder / "status.json").read_text()) == {"hash": "abc", "state": "running", "step": 0}
    assert run.checkpoint is None
    (run.folder / "checkpoints" / "last.ckpt").touch()
    assert run.checkpoint == run.folder / "checkpoints" / "last.ckpt"


def test_numbers_go_up_past_gaps_and_other_folders(tmp_path):
    (tmp_path / "0007").mkdir()
    (tmp_path / "notes").mkdir()
    assert [make_run(tmp_path).folder.name for _ in range(2)] == ["0008", "0009"]


def test_runs_that_start_at_the_same_moment_get_different_folders(tmp_path):
    start = time.time() + 0.3
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                time.sleep(max(0.0, start - time.time()))
                make_run(tmp_path)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{n:04d}" for n in range(1, 9)]
    assert all((f / "checkpoints" / "config.yaml").is_file() for f in tmp_path.iterdir())


def test_the_newest_unfinished_run_of_the_same_recipe_is_found(tmp_path):
    runs = [Run.create(tmp_path, text="", config={}, hash=h) for h in ("a", "a", "b", "a")]
    runs[3].mark("finished", 9)
    runs[1].mark("interrupted", 5)
    found = Run.newest_unfinished(tmp_path, "a")
    assert found is not None
    assert found.folder.name == "0002"
    assert found.status == {"hash": "a", "state": "interrupted", "step": 5}
    assert Run.newest_unfinished(tmp_path, "c") is None
    assert Run.newest_unfinished(tmp_path / "nowhere", "a") is None


def test_the_run_that_is_gone_on_with_stays_locked(tmp_path):
    if (child := os.fork()) == 0:
        Run.create(tmp_path, text="", config={}, hash="a")
        os._exit(0)
    os.waitpid(child, 0)
    found = Run.newest_unfinished(tmp_path, "a")
    assert found is not None
    if (child := os.fork()) == 0:
        try:
            Run.open(found.folder)
        except UserError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_damaged_status_is_no_candidate(tmp_path):
    run = make_run(tmp_path)
    (run.folder / "status.json").write_text('{"hash": "ti')
    assert run.status == {}
    assert Run.newest_unfinished(tmp_path, "tiny") is None


def test_a_run_that_another_process_trains_is_left_alone_until_that_process_is_gone(tmp_path):
    ready, done = tmp_path / "ready", tmp_path / "done"
    root = tmp_path / "runs"
    child = os.fork()
    if child == 0:
        try:
            run = make_run(root)
            if os.fork() == 0:  # like a data worker: it must not keep the lock of a parent that was killed
                for _ in range(500):
                    if done.exists():
                        break
                    time.sleep(0.01)
                os._exit(0)
            ready.touch()
            time.sleep(20)
            assert run
        finally:
            os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        assert Run.newest_unfinished(root, "tiny") is None
        with pytest.raises(UserError, match="0001 is being trained by another process"):
            Run.open(root / "0001")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert Run.newest_unfinished(root, "tiny") is not None
    assert Run.open(root / "0001").folder.name == "0001"
    done.touch()


def test_ranks_take_the_folder_of_rank_0(tmp_path, monkeypatch):
    first = make_run(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = make_run(tmp_path)
    assert second.folder == first.folder.resolve()
    second.mark("finished", 3)
    assert first.status["state"] == "running", "only rank 0 writes"
    assert Run.newest_unfinished(tmp_path, "tiny").folder == first.folder.resolve()
    monkeypatch.delenv("ZOO_RUN")
    with pytest.raises(UserError, match="rank 1 does not know its folder; set ZOO_RUN"):
        make_run(tmp_path)


def test_a_second_training_of_one_process_gets_its_own_folder(tmp_path, monkeypatch):
    assert make_run(tmp_path).folder.name == "0001"
    assert make_run(tmp_path).folder.name == "0002"
    monkeypatch.setenv("RANK", "0")  # torchrun: the user has said for all ranks where to write
    monkeypatch.setenv("ZOO_RUN", str(tmp_path / "chosen"))
    assert make_run(tmp_path).folder.name == "chosen"
    assert make_run(tmp_path).folder.name == "0003", "ZOO_RUN is what the training before has left"


@pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
def test_under_a_launcher_rank_0_makes_the_folder_that_all_ranks_know(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "0")
    monkeypatch.setenv("ZOO_RUN", str(tmp_path / "chosen"))
    first = make_run(tmp_path / "runs")
    assert first.folder == tmp_path / "chosen"
    monkeypatch.setenv(launcher, "3")
    assert make_run(tmp_path / "runs").folder == first.folder
    monkeypatch.setenv(launcher, "0")
    monkeypatch.setattr(Run, "_announced", None)  # as in another process
    with pytest.raises(UserError, match=r"chosen exists already; name a new folder, or go on with --resume="):
        make_run(tmp_path / "runs")


def test_a_run_goes_on_under_another_recipe_and_is_found_as_such(tmp_path, caplog):
    run = Run.create(tmp_path, text="", config={"lr": 1}, hash="a")
    run.mark("finished", 5)
    run.retarget({"lr": 2}, "b")
    assert "started with other settings" in caplog.text
    assert run.status == {"hash": "b", "state": "interrupted", "step": 5}
    configs = {f.name: yaml.safe_load(f.read_text()) for f in (run.folder / "checkpoints").iterdir()}
    assert configs == {"config.yaml": {"lr": 2}, "config-until-5.yaml": {"lr": 1}}
    assert Run.newest_unfinished(tmp_path, "b").folder == run.folder
    assert Run.newest_unfinished(tmp_path, "a") is None
    caplog.clear()
    run.retarget({"lr": 2}, "b")
    assert not caplog.text, "its own recipe is no news"


def test_a_kill_while_retargeting_loses_nothing(tmp_path, monkeypatch):
    run = Run.create(tmp_path, text="", config={"lr": 1}, hash="a")

    def killed(path, *rest, **options):
        if path.name == "status.json":
            raise KeyboardInterrupt
        return write_file(path, *rest, **options)

    monkeypatch.setattr("zoo.tasks.run.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run.retarget({"lr": 2}, "b")
    monkeypatch.undo()
    assert run.status["hash"] == "a"
    run.retarget({"lr": 2}, "b")
    configs = {f.name: yaml.safe_load(f.read_text()) for f in (run.folder / "checkpoints").iterdir()}
    assert configs == {"config.yaml": {"lr": 2}, "config-until-0.yaml": {"lr": 1}}
    assert run.status["hash"] == "b"


def test_a_kill_while_marking_leaves_a_whole_status(tmp_path):
    run = make_run(tmp_path)

    def work():
        os.setpgrp()
        own = Run(run.folder)
        for step in range(10**6):
            own.mark("running", step)
            if step == 200:
                os.kill(os.getppid(), 0)
                signal.setitimer(signal.ITIMER_REAL, 0.003)

    assert in_child(work, tmp_path / "said.txt") == -signal.SIGALRM
    assert run.status["step"] >= 200


def test_wrong_names_are_said():
    with pytest.raises(ValueError, match="must be one of running, finished, interrupted, got 'done'"):
        Run("x").mark("done", 1)
    with pytest.raises(UserError, match=r"nowhere has no status\.json"):
        Run.open("nowhere")
