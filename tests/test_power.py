"What is foretold of an evaluation comes true: intervals hold planted gains, and gains are found as often as was said."
import json
import math
from pathlib import Path

import pytest
import torch

from dual_ipo.config import commented_yaml
from dual_ipo.core import UserError, generator
from dual_ipo.demo import demo_config
from dual_ipo.ending import main
from dual_ipo.power import (TYPICAL, Spread, evaluation_power, power, prompts_for, smallest_gain, spread_of,
                            spread_of_run, standard_error)
from dual_ipo.stats import bootstrap_ci, paired_difference
from dual_ipo.store import read_table, write_table

MAIN = Path(__file__).parent.parent/"nbs/studies/results/main/clips.parquet"


def planted(gain, prompts, clips, spread, *keys):
    "Scores of two generators, whose clips have levels of their own, and gains by prompt and by clip."
    rng, tables = generator("planted", gain, *keys), ([], [])
    def normal(*shape): return torch.randn(shape, generator=rng)
    level = 50 + 5*normal(prompts, 1) + 10*normal(prompts, clips)
    change = gain + spread.between*normal(prompts, 1) + spread.within*normal(prompts, clips)
    for rows, points in zip(tables, (level, level + change)):
        for p, own in enumerate(points.tolist()):
            rows += [dict(prompt=f"p{p}", candidate=c, total=x/100) for c, x in enumerate(own)]
    return tables


@pytest.mark.parametrize("gain, prompts, clips, spread", [
    (2., 50, 2, Spread(3., 6.)), (0., 50, 4, Spread(6., 6.)), (3., 40, 1, Spread(8., 0.))])
def test_intervals_hold_the_truth_and_find_gains_as_often_as_foretold(gain, prompts, clips, spread):
    "240 experiments: nineteen of twenty intervals hold what was planted (three standard errors of their number aside)."
    n, holds, finds = 240, 0, 0
    for k in range(n):
        low, high = paired_difference(*planted(gain, prompts, clips, spread, k))["ci95"]
        holds, finds = holds + (low <= gain <= high), finds + (low > 0 or high < 0)
    foretold = power(gain, prompts, clips, spread)
    assert holds/n > .95 - 3*math.sqrt(.95*.05/n)
    assert finds/n == pytest.approx(foretold, abs=3*math.sqrt(max(foretold*(1 - foretold), .03)/n))


def test_clips_of_a_prompt_are_not_alone():
    "An interval that takes clips for prompts promises too much."
    spread, narrow = Spread(8., 4.), 0
    for k in range(120):
        before, after = planted(0., 30, 8, spread, k)
        low, high = bootstrap_ci([100*(b["total"] - a["total"]) for a, b in zip(before, after)], n=500)
        narrow += low > 0 or high < 0
    assert narrow/120 > .25 > .1 > power(0., 30, 8, spread)


def test_the_spread_is_found_again():
    for spread in (Spread(3., 13.), Spread(0., 5.), Spread(6., 2.)):
        before, after = planted(1., 3000, 3, spread)
        gains = [100*(b["total"] - a["total"]) for a, b in zip(before, after)]
        found = spread_of(gains, [row["prompt"] for row in after])
        assert found.within == pytest.approx(spread.within, rel=.05)
        assert found.between == pytest.approx(spread.between, rel=.1, abs=.6)
    uneven = [i for i, row in enumerate(after) if row["candidate"] == 0 or int(row["prompt"][1:]) % 3]
    found = spread_of([gains[i] for i in uneven], [after[i]["prompt"] for i in uneven])
    assert found.between == pytest.approx(6., rel=.1) and found.within == pytest.approx(2., rel=.1)
    with pytest.raises(UserError, match="two or more"): spread_of([1., 2.], ["a", "a"])


def test_what_is_needed_is_enough_and_not_more():
    spread = Spread(3., 13.)
    for gain in (.5, 1., 2., 5.):
        n = prompts_for(gain, 2, spread, wanted=.9)
        assert power(gain, n, 2, spread) >= .9 and smallest_gain(n, 2, spread, wanted=.9) <= gain
        assert n == 2 or power(gain, n - 1, 2, spread) < .9 + 1e-6
    assert standard_error(100, 10**6, spread) == pytest.approx(.3, rel=1e-3)   # more clips don't help against prompts


def test_the_toys_base_spreads_as_is_said():
    "`TYPICAL`, and that the base's spread errs on the safe side for the gains."
    rows = [row for row in read_table(MAIN) if (row["variant"], row["seed"], row["arch"]) == ("dual", 1, "wan")]
    totals = [{(row["prompt"], row["clip"]): 100*row["total"] for row in rows if row["round"] == k} for k in (0, 1, 3)]
    prompts = [prompt for prompt, _ in totals[0]]
    base = spread_of([*totals[0].values()], prompts)
    assert base.within == pytest.approx(TYPICAL.within, rel=.1) and base.between < 2*TYPICAL.between
    for later in totals[1:]:
        gains = spread_of([later[key] - x for key, x in totals[0].items()], prompts)
        assert standard_error(96, 4, gains) < standard_error(96, 4, base)


def test_a_plan_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = demo_config("wan", "dpo", 1, 0)
    (tmp_path/"toy.yaml").write_text(commented_yaml(config), "utf-8")
    assert main(["plan", "toy.yaml"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation:"))
    assert "72 prompts × 2 clips show a gain of 3.2 points with 80% power; one of 2 needs 184, 1 needs 734" in line
    assert "in the toy world" in line
    before, after = planted(2., 100, 2, Spread(2., 4.))
    for k, rows in enumerate((before, after)):
        write_table(tmp_path/f"runs/toy/round_0{k}/evaluate/scores.parquet", rows)
    assert main(["plan", "toy.yaml", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["evaluation"]
    assert facts["source"] == "of the gains of round 1" and facts["within"] == pytest.approx(4., rel=.2)
    assert facts == json.loads(json.dumps(evaluation_power(config, tmp_path/"runs/toy")))
    for row in after: row["total"] = None
    write_table(tmp_path/"runs/toy/round_01/evaluate/scores.parquet", after)
    assert spread_of_run(tmp_path/"runs/toy")[1] == "of the base's clips"
