"A judge behind HTTP: the local judge's grades, votes with named seeds, and what becomes of failures."
import json
import math
import time
from argparse import Namespace

import pytest
import torch

from dual_ipo import served as module
from dual_ipo.cli import start_run
from dual_ipo.config import parse_config
from dual_ipo.core import Pair, UserError, Video, VideoFile, noise
from dual_ipo.cot import DIMENSIONS, clip_item
from dual_ipo.reward import Judge
from dual_ipo.rounds import run_round
from dual_ipo.served import Endpoints, open_served
from dual_ipo.srpo import cold_start
from dual_ipo.store import read_table
from dual_ipo.toyworld import CHECKPOINTS
import serving
from serving import image_at, served
from test_runs import given, small_config, write   # noqa: F401


def clip(*key): return Video((noise((9, 3, 32, 32), *key)*64 + 128).clamp(0, 255).byte(), 8.)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    "The toy's, which has learned to begin an answer and to put digits into it."
    judge, items = Judge.load(CHECKPOINTS/"judge"), []
    for i in range(16):
        grades = dict(zip(DIMENSIONS, ((i + j) % 5 + 1 for j in range(4))))
        items.append(clip_item(f"a {('red', 'blue')[i % 2]} circle moves", clip(i), grades=grades))
    cold_start(judge, items, tmp_path_factory.mktemp("cold"), 12, 1e-3, batch_size=4)
    return judge


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch): monkeypatch.setattr(module, "WAIT", .001)


CLIPS = [("a red circle moves left", clip("a")), ("a blue square <image> moves up", clip("b"))]


def at(*urls, timeout=30.): return open_served(CHECKPOINTS/"judge", list(urls), timeout)


def test_grades_are_the_judges(judge):
    "As near as the 20 likeliest tokens tell: the local judge's log-probabilities of digits that are among them."
    with served(judge) as (url, asked): found = at(url).grades(CLIPS)
    own = judge.grades(CLIPS)
    assert torch.allclose(found, own, atol=2e-4), (found, own)
    assert len(asked) == 2*4 and len({tuple(row) for row in own.tolist()}) == 2   # a request a grade; clips differ
    body = asked[0]
    assert body["model"] == "the judge" and body["max_tokens"] == 1 and body["top_logprobs"] == 20
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"]*5 + ["text"]
    assert all("<image>" not in body["messages"][0]["content"][-1]["text"] for body in asked)


def test_other_questions_are_the_judges(judge, monkeypatch):
    """The explained question with labelled frames, three of each clip. This judge has not learned it, so some digits
    are not among the 20 likeliest tokens: from a server that returns all the grades are the same, from others near."""
    settings = dict(question="explained", max_pixels=1024, frames_per_video=3)
    own = Judge(judge.model, judge.processor, 3)
    own.question = "explained"
    with served(own) as (url, asked):
        remote = open_served(CHECKPOINTS/"judge", [url], 30., **settings)
        near = remote.grades(CLIPS)
        for where in (module, serving): monkeypatch.setattr(where, "TOP", 10**4)
        found = remote.grades(CLIPS)
    assert torch.allclose(found, own.grades(CLIPS), atol=2e-4)
    assert not torch.allclose(near, found, atol=2e-4) and torch.allclose(near, found, atol=.5)
    small = image_at(asked[0]["messages"][0]["content"][1]["image_url"]["url"])
    assert small.shape == (3, 32, 32)   # as they are, for they are small enough
    kinds = [part["type"] for part in asked[0]["messages"][0]["content"]]
    assert kinds.count("image_url") == 3 and len(kinds) > 3


def test_votes_have_named_seeds(judge):
    "The same names, the same votes; each vote has a seed of its own, each order its own question."
    pairs = [Pair("a red circle moves left", clip("a"), clip("b"), pair_id="0")]
    sampling = dict(max_new_tokens=6, dimensions=[], batch=4)
    with served(judge) as (url, asked):
        one, again = (at(url).vote(pairs, 4, ("x", 1), **sampling)[0] for _ in range(2))
        other = at(url).vote(pairs, 4, ("x", 2), **sampling)[0]
    seeds = [body["seed"] for body in asked]
    assert len(set(seeds[:4])) == 4 and sorted(seeds[:4]) == sorted(seeds[4:8]) and not set(seeds[:4]) & set(seeds[8:])
    assert one.n_votes == 4 and [vote.text for vote in one.votes] == [vote.text for vote in again.votes]
    assert [vote.order for vote in one.votes] == ["ab", "ab", "ba", "ba"] and len(other.votes) == 4
    assert all(math.isnan(vote.log_prob) for vote in one.votes) and asked[0]["temperature"] == .7


def test_failures_are_asked_again(judge):
    "Full, broken, or too slow: the grades are those of a server that never failed."
    with served(judge) as (url, _): own = at(url).grades(CLIPS[:1])
    def slow(answer):
        time.sleep(1.5)
        return answer
    faults = {0: 500, 1: 429, 2: slow, 5: 503}
    with served(judge, faults.get) as (url, asked):
        found = at(url, timeout=.75).grades(CLIPS[:1])
        assert torch.equal(found, own) and len(asked) == 4 + len(faults)


def test_one_of_two_may_die(judge):
    "Its questions go to the other, and it is left alone for a while."
    own = judge.grades(CLIPS)
    with served(judge) as (good, asked):
        with served(judge, lambda n: 500) as (bad, refused):
            both = at(bad, good)
            assert torch.allclose(both.grades(CLIPS), own, atol=2e-4)
            seen = len(refused)
            assert torch.allclose(both.grades(CLIPS), own, atol=2e-4) and len(refused) == seen <= 2
        assert torch.allclose(at(bad, good).grades(CLIPS), own, atol=2e-4)   # nobody answers there
    assert len(asked) == 3*8


def test_a_dead_endpoint_is_named(judge, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    with served(judge, lambda n: 500) as (url, asked): pass
    line = f"^judge {url}: ConnectError: .*, asked 3 times; start it, then run the same command again$"
    with pytest.raises(UserError, match=line): at(url).grades(CLIPS)
    with served(judge, lambda n: 500) as (url, asked):
        line = f"^judge {url}: says 500 Internal Server Error, asked 3 times; start it"
        with pytest.raises(UserError, match=line): at(url).grades(CLIPS[:1])
        assert len(asked) == 3


def without_logprobs(answer):
    del answer["choices"][0]["logprobs"]
    return answer


def of_other_tokens(answer):
    for i, one in enumerate(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]): one["token"] = f"word{i}"
    return answer


def not_a_number(answer):
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]: one["logprob"] = math.nan
    return answer


@pytest.mark.parametrize("fault,why", [
    (b"<html>no", "no JSON object"), (b"[1]", "no JSON object"), (b"{}", "KeyError 'choices'"),
    (b'{"choices": []}', "IndexError"), (b'{"choices": [{"logprobs": null}]}', "TypeError"),
    (without_logprobs, "KeyError 'logprobs'"), (of_other_tokens, "none of 1, 2, 3, 4, 5 among the likeliest tokens"),
    (not_a_number, "none of 1, 2, 3, 4, 5"), (404, "says 404 Not Found: 'no room'; see cluster.endpoints")])
def test_a_score_that_cannot_be_read_is_an_error(judge, fault, why):
    "In one line that names the endpoint; it is not asked again, and is never a number."
    with served(judge, lambda n: fault if n == 2 else None) as (url, asked):
        with pytest.raises(UserError) as error: at(url).grades(CLIPS[:1])
    line = str(error.value)
    assert line.startswith(f"judge {url}: ") and why in line and "\n" not in line and len(asked) == 3, line


def test_a_vote_without_text_is_an_error(judge):
    silent = json.dumps(dict(choices=[dict(message=dict(content=None, reasoning_content="so"))])).encode()
    with served(judge, lambda n: silent) as (url, _):
        with pytest.raises(UserError, match="message.content is no text; does a reasoning parser take it out"):
            at(url).vote([Pair("x", clip("a"), clip("b"))], 2, ("x",), max_new_tokens=4)


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "abc")
    assert Endpoints(["http://a/v1"], 1).client.headers["authorization"] == "Bearer abc"
    monkeypatch.delenv("JUDGE_API_KEY")
    assert "authorization" not in Endpoints(["http://a/v1"], 1).client.headers


HTTP = dict(judge=dict(backend="http"), srpo=dict(steps=0), cluster=dict(endpoints=["http://a:8000/v1"]))


@pytest.mark.parametrize("part,changes,why", [
    ("srpo", dict(steps=1), "srpo.steps: a judge behind HTTP is not trained; set it to 0"),
    ("cluster", dict(endpoints=[]), "cluster.endpoints: are what judge.backend http asks; give both"),
    ("judge", dict(backend="vllm"), "cluster.endpoints: are what judge.backend http asks"),
    ("cluster", dict(endpoints=["a:8000"]), "cluster.endpoints: 'a:8000' is no address; write http://host:8000/v1"),
    ("cluster", dict(timeout=0), "cluster.timeout")])
def test_configs_that_cannot_work_are_refused(part, changes, why):
    parse_config(HTTP, "run.yaml")
    with pytest.raises(UserError) as error: parse_config(HTTP | {part: HTTP[part] | changes}, "run.yaml")
    assert why in str(error.value)


@pytest.mark.timeout(600)
def test_a_run_with_a_static_judge(judge, given, tmp_path, monkeypatch):   # noqa: F811
    "Candidates are ranked by the grades of the judge at home; people's pairs measure it, and nothing is trained."
    for where in (module, serving): monkeypatch.setattr(where, "TOP", 10**4)   # all, so that the grades are the same
    judge.save(given/"learned")
    config = small_config()
    config["judge"] |= dict(path="learned", backend="http", max_new_tokens=4, batch_size=4)
    config["srpo"]["steps"], config["candidates"]["prompts_per_round"], config["evaluate"]["prompts"] = 0, 3, 2
    config["evaluate"]["measure"] = None
    config["align"]["steps"] = 2
    with served(judge) as (url, asked):
        config["cluster"]["endpoints"] = [url]
        run = start_run(Namespace(config=write(given, "served.yaml", config), out=tmp_path/"run"))
        run_round(run, 0)
        entry = run_round(run, 1)
    folder = run.path/"round_01"
    rows = read_table(folder/"scores.parquet")
    clips = [(row["prompt"], VideoFile(folder/"candidates"/row["clip"])) for row in rows]
    own = judge.grades(clips)
    assert torch.allclose(torch.tensor([[row[d] for d in DIMENSIONS] for row in rows]), own, atol=2e-4)
    assert [row["score"] for row in rows] == pytest.approx(own.mean(1).tolist(), abs=2e-4)
    assert not (run.path/"round_00/judge").exists() and not (folder/"judge").exists()
    assert entry["judge"]["n_pairs"] > 0 and 1 <= entry["judge"]["judged"] <= 5
    config["cluster"]["endpoints"] = ["http://127.0.0.1:9/v1"]   # another address is no other run
    with pytest.raises(UserError, match="judge http://127.0.0.1:9/v1: ConnectError.*; start it, or take it out of"):
        start_run(Namespace(config=write(given, "served.yaml", config), out=tmp_path/"other"))
