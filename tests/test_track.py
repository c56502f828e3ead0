"Curves in a tracker: every row once, whatever was killed, and a tracker that fails stops nothing."
import io
import shutil
import sys
import threading
import time
import types
import warnings

import pytest
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dual_ipo import cli, track
from dual_ipo.cli import ROUND
from dual_ipo.config import Config, may_of
from dual_ipo.store import Run, mark_done, read_json, read_table, write_json, write_table
from dual_ipo.track import CLIPS, Follower, fault_of, following, scalars, streams
from synthetic import synthetic_run


@pytest.fixture(scope="module")
def made(tmp_path_factory): return synthetic_run(tmp_path_factory.mktemp("made")/"run", rounds=2, n=3)


def begun(made, folder, name="tensorboard"):
    "A finished run that names a tracker."
    run = Run.load(shutil.copytree(made, folder))
    run.config["track"] = name
    return run


def rows(n): return [dict(step=i, loss=1 - i/100, skipped=False) for i in range(n)]


def curves(run):
    "{tag: [(step, value)]}, as TensorBoard shows it."
    found = EventAccumulator(str(run.path/"track"), size_guidance=dict(scalars=0, images=0)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def pushed_in_one_go(run):
    follower = Follower(run, "tensorboard")
    follower.open()
    follower.push()
    follower.close()
    return follower


def expected(run):
    "{tag: values} of everything in the run folder, and how many steps that takes."
    values, steps = {}, 0
    for _, stream in streams(run):
        for row in stream:
            for tag, x in row.items() if isinstance(row, dict) else (): values.setdefault(tag, []).append(x)
        steps += len(stream)
    return values, steps


def check_whole(run):
    "Every row is there once, and no step has two rows of one stream."
    values, steps = expected(run)
    shown = curves(run)
    assert shown.keys() == values.keys()
    for tag, points in shown.items():
        assert [x for _, x in points] == pytest.approx(values[tag]), tag
        assert [step for step, _ in points] == sorted({step for step, _ in points}), tag
    assert read_json(run.path/"track.json")["tensorboard"]["step"] == steps
    loss = [step for step, _ in shown["align/loss"]][:60]
    assert loss == list(range(loss[0], loss[0] + 60))   # of one training, side by side


def test_everything_of_a_run_is_told_once_in_the_order_of_the_loop(made, tmp_path):
    run = begun(made, tmp_path/"run")
    with following(run, .05): pass
    check_whole(run)
    shown = curves(run)
    assert [x for _, x in shown["round/number"]] == [0, 1, 2]
    ends = [step for step, _ in shown["round/number"]]
    assert ends[0] < shown["align/loss"][0][0] < ends[1] < shown["align/loss"][-1][0] < ends[2]
    entry = read_json(run.round(2)/"round.json")
    assert shown["generator/total"][-1][1] == pytest.approx(entry["generator"]["total"])
    assert shown["judge/accuracy"][-1][1] == pytest.approx(entry["judge"]["accuracy"])
    before = curves(run)
    with following(run, .05): pass
    assert curves(run) == before


def test_rows_come_while_the_training_goes_on(made, tmp_path):
    "Checkpoints are all there is of a training under way; then it ends."
    run = begun(made, tmp_path/"run")
    align = run.round(2)/"align"
    history = read_table(align/"history.parquet")
    (align/"history.parquet").unlink()
    for name in ("round.json", "evaluate/scores.parquet"): (run.round(2)/name).unlink()
    def shown(): return len(curves(run).get("align/loss", []))
    with following(run, .02):
        for n in (20, 40):
            write_table(align/f"step_{n:06d}/history.parquet", history[:n])
            mark_done(align/f"step_{n:06d}")
            end = time.monotonic() + 60
            while shown() < 60 + n and time.monotonic() < end: time.sleep(.05)
            assert shown() == 60 + n
        write_table(align/"history.parquet", history)
    assert shown() == 120


@pytest.mark.parametrize("after", [2, 3])
def test_killed_between_telling_and_remembering(made, tmp_path, monkeypatch, after):
    "What the killed process told last is told again under the same steps, and shown once."
    run, left = begun(made, tmp_path/"run"), iter(range(after))
    real = Follower.remember
    def dies(self):
        if next(left, None) is None: raise KeyboardInterrupt
        real(self)
    monkeypatch.setattr(Follower, "remember", dies)
    with pytest.raises(KeyboardInterrupt): pushed_in_one_go(run)
    monkeypatch.undo()
    known = read_json(run.path/"track.json")["tensorboard"]
    assert sum(known["pushed"].values()) == known["step"] < expected(run)[1]
    pushed_in_one_go(run).remember()
    check_whole(run)


class Broken(TensorBoardTracker):
    "Raises where it is told to."
    where, at = "log", 70

    def start(self):
        if self.where == "start": raise ModuleNotFoundError("No module named 'wandb'")
        super().start()

    def log(self, values, step=None):
        if self.where == "log" and step == self.at: raise ConnectionError("no route to\nhost")
        if self.where == "exit" and step == self.at: raise SystemExit(1)
        super().log(values, step=step)

    def finish(self):
        if self.where == "finish": raise RuntimeError
        super().finish()


@pytest.mark.parametrize("where, words", [("start", ["No module named 'wandb'", "install it"]),
    ("log", ["no route to host", "set track to null"]), ("exit", ["1"]), ("finish", ["RuntimeError"])])
def test_a_tracker_that_fails_stops_nothing(made, tmp_path, monkeypatch, where, words):
    "One line, kept for whoever looks after the run; the next round goes on without gap or double step."
    run, worked = begun(made, tmp_path/"run"), False
    monkeypatch.setattr(Broken, "where", where)
    monkeypatch.setattr(track, "TensorBoardTracker", Broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with following(run, .05): worked = True
    lines = [str(each.message) for each in said if "track:" in str(each.message)]
    assert worked and len(lines) == 1 and "\n" not in lines[0] and all(word in lines[0] for word in words), lines
    assert "the run goes on" in lines[0] and fault_of(run) == lines[0]
    monkeypatch.undo()
    with following(run, .05): pass
    assert fault_of(run) is None
    check_whole(run)


def test_a_tracker_that_does_not_answer_is_left_alone(made, tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(TensorBoardTracker, "start", lambda self: over.wait(60))
    began = time.monotonic()
    with pytest.warns(RuntimeWarning, match="does not answer"):
        with following(begun(made, tmp_path/"run"), .01, patience=.1): pass
    assert time.monotonic() - began < 30
    assert not (tmp_path/"run/track").exists()   # its curves wait for a better day
    over.set()


def test_a_damaged_memory_stops_nothing(made, tmp_path):
    run, worked = begun(made, tmp_path/"run"), False
    (run.path/"track.json").write_text("{", "utf-8")
    with pytest.warns(RuntimeWarning, match="track.json.*the run goes on"):
        with following(run, .01): worked = True
    assert worked and not (run.path/"track").exists()


def test_off_by_default(made, tmp_path):
    run, before = begun(made, tmp_path/"run", None), threading.active_count()
    with following(run): assert threading.active_count() == before
    assert not (run.path/"track.json").exists() and not (run.path/"track").exists() and fault_of(run) is None


def test_clips_move_in_tensorboard(made, tmp_path):
    run = begun(made, tmp_path/"run")
    with following(run, .05): pass
    found = EventAccumulator(str(run.path/"track"), size_guidance=dict(images=0)).Reload()
    tags = found.Tags()["images"]
    assert len(tags) == min(3, CLIPS) and all(tag.startswith("clips/") for tag in tags)
    for tag in tags:
        events = found.Images(tag)
        assert len(events) == 3   # rounds
        image = Image.open(io.BytesIO(events[0].encoded_image_string))
        assert image.format == "GIF" and image.n_frames > 1 and image.size == (events[0].width, events[0].height)
    assert found.Images(tags[0])[0].encoded_image_string != found.Images(tags[0])[2].encoded_image_string


def test_a_measure_that_came_later_is_told_later(made, tmp_path):
    run = begun(made, tmp_path/"run")
    entry = read_json(run.round(1)/"round.json")
    write_json(run.round(1)/"round.json", entry | dict(generator={}))
    pushed_in_one_go(run)
    assert len(curves(run)["generator/total"]) == 2
    write_json(run.round(1)/"round.json", entry)
    pushed_in_one_go(run)
    assert len(curves(run)["generator/total"]) == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_finds_its_run_again(made, tmp_path, monkeypatch, name):
    "A stub of the library: the same id, steps that only grow, clips as its own videos."
    told, began = [], []
    class Service:
        config = types.SimpleNamespace(update=lambda *_, **__: began.append("config"))
        def log(self, values, step=None): told.append((step, values))
        def finish(self): pass
    def init(**settings):
        began.append(settings)
        return Service()
    stub = types.SimpleNamespace(init=init, config=Service.config, Video=lambda path, **how: (path, how["caption"]))
    monkeypatch.setitem(sys.modules, name, stub)
    run = begun(made, tmp_path/"run", name)
    shutil.move(run.round(2), tmp_path/"later")
    with following(run, .05): pass
    n = len(told)
    shutil.move(tmp_path/"later", run.round(2))
    with following(run, .05): pass
    starts = [each for each in began if each != "config"]
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0]["resume"] == "allow" and began.count("config") == 1
    assert starts[0]["project"] == "dual-ipo" and 0 < n < len(told) and fault_of(run) is None
    steps = [step for step, _ in told]
    assert steps == sorted(steps)
    clips = [values for _, values in told if any(tag.startswith("clips/") for tag in values)]
    assert len(clips) == 9 and all(path.endswith(".mp4") and caption in tag for values in clips
                                   for tag, (path, caption) in values.items())


def test_one_that_takes_no_clips_gets_curves(made, tmp_path, monkeypatch):
    run = begun(made, tmp_path/"run")
    monkeypatch.setattr(track, "gif", lambda path: 1/0)
    with pytest.warns(RuntimeWarning, match="takes no clips") as said:
        with following(run, .05): pass
    assert len([each for each in said if "no clips" in str(each.message)]) >= 1 and fault_of(run) is None
    check_whole(run)


def test_names_and_numbers():
    row = dict(step=1, loss=float("nan"), total=3, ci95=[1, 2], dims={"a:b|c": 4.}, name="x", flag=True, nothing=None)
    assert scalars("g", row) == {"g/total": 3., "g/total_low": 1., "g/total_high": 2., "g/a_b_c": 4., "g/flag": 1.}


def test_the_command_says_what_failed_and_a_round_is_followed(tmp_path, monkeypatch, capsys):
    def execute_round(run, k, on):
        entry = dict(round=k, generator={}, judge={}, seconds={})
        with following(run, .01): write_json(run.round(k)/"round.json", entry)
        mark_done(run.round(k))
    monkeypatch.setitem(sys.modules, "wandb", None)   # as if it were not installed
    monkeypatch.setattr(cli, "execute_round", execute_round)
    cli.run_rounds(Run.open(tmp_path/"run", Config(rounds=1, track="wandb").model_dump()), "here")
    said = [line for line in capsys.readouterr().err.splitlines() if " track: wandb: " in line]
    assert len(said) == 2 and all("install it" in line for line in said)   # a round each
    assert "with following(r.run)" in ROUND.read_text("utf-8") and may_of(Config)["track"] == "change"
