"Intervals that hold what they promise, and accuracy with ties against brute force."
import math

import pytest
import torch

from dual_ipo.core import UserError, generator
from dual_ipo.evaluate import judge_accuracy, score_videos, summarise
from dual_ipo.stats import accuracy, accuracy_with_ties, bootstrap_ci, paired_difference, tie_threshold


def trial(i, P=30, N=6):
    "Scores of `P` prompts with `N` clips each; most of the spread lies between prompts. Their true mean is 0."
    g = generator("coverage", i)
    values = torch.randn(P, 1, generator=g) + .5*torch.randn(P, N, generator=g)
    return values.flatten().tolist(), [j//N for j in range(P*N)]


def test_bootstrap_covers_the_truth():
    "95% by name: between 90% and 99% in 300 trials. Drawing clips, not prompts, would hold the truth in about 60%."
    inside, naive = 0, 0
    for i in range(300):
        values, prompts = trial(i)
        low, high = bootstrap_ci(values, prompts, n=400, seed=i); inside += low < 0 < high
        low, high = bootstrap_ci(values, n=400, seed=i); naive += low < 0 < high
    assert .90 <= inside/300 <= .99 and naive/300 < .75


def test_bootstrap_is_named_and_fair():
    values, prompts = trial(0)
    assert bootstrap_ci(values, prompts) == bootstrap_ci(values, prompts) != bootstrap_ci(values, prompts, seed=1)
    state = torch.get_rng_state(); bootstrap_ci(values); assert torch.equal(state, torch.get_rng_state())
    assert bootstrap_ci([2., 2., 2.]) == (2., 2.) and bootstrap_ci([1.], ["p"]) == (1., 1.)
    assert bootstrap_ci([0., 0., 0., 1.], list("aaab"), level=1)[0] == 0
    assert bootstrap_ci([0., 1.], list("aa")) == (.5, .5)   # a prompt comes whole
    narrow, wide = bootstrap_ci(values, prompts, level=.5), bootstrap_ci(values, prompts, level=.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_paired_difference_matches_clips():
    before = [dict(prompt=p, candidate=s, total=p/10) for p in range(5) for s in range(2)]
    after = [dict(prompt=p, candidate=s, total=p/10 + .03) for p in reversed(range(4)) for s in range(3)]
    gain = paired_difference(before, after)
    assert math.isclose(gain["difference"], 3, rel_tol=1e-9) and gain["n_clips"] == 8
    assert all(abs(x - 3) < 1e-9 for x in gain["ci95"])
    with pytest.raises(UserError, match="no prompt and candidate"):
        paired_difference(before, [dict(prompt=9, candidate=0, total=.1)])


def test_scores_of_paths_and_tensors(tmp_path):
    videos = torch.full((5, 3, 3, 16, 16), 128, dtype=torch.uint8)
    def measure(videos, prompts):
        return dict(total=videos.float().mean((1, 2, 3, 4))/255, length=torch.tensor([len(p) for p in prompts]))
    scores = score_videos(measure, videos, list("abcde"), batch=2)
    assert scores["total"].shape == (5,) and scores["length"].tolist() == [1]*5
    with pytest.raises(UserError, match="shape"):
        score_videos(lambda v, p: dict(total=torch.ones(1)), videos, list("abcde"))
    broken = torch.tensor([1, math.nan, 1, math.inf, 1])
    with pytest.raises(UserError, match="isn't finite for 2"):
        score_videos(lambda v, p: dict(total=broken), videos, list("abcde"))
    with pytest.raises(UserError, match="no clips"): summarise({}, [])


def test_tie_threshold_is_the_best_there_is():
    "Against every threshold that can be: no grid does better."
    for i in range(30):
        g = generator("ties", i)
        smooth = i % 2   # or vote fractions
        p = torch.rand(40, generator=g).double() if smooth else torch.randint(0, 9, (40,), generator=g).double()/8
        truth = [["A", "B", "tie"][j] for j in torch.randint(0, 3, (40,), generator=g).tolist()]
        best = accuracy_with_ties(p, truth, tie_threshold(p, truth))
        epsilons = [-1] + torch.linspace(0, .5, 101).tolist()
        assert best >= max(accuracy_with_ties(p, truth, epsilon) for epsilon in epsilons)
    assert tie_threshold(torch.tensor([.9]), ["A"]) == -1 and accuracy_with_ties(torch.tensor([.9]), ["A"], -1) == 1


def test_accuracy_leaves_ties_out():
    assert accuracy(torch.tensor([.9, .1, .7]), ["A", "A", "tie"]) == .5 and accuracy(torch.tensor([.5]), ["B"]) == .5
    entry = judge_accuracy(["A", "B", "A", "B"], torch.tensor([.9, .2, .3, .4]), torch.tensor([.9, .8, .3, .6]),
                            gap=[.4, .3, .1, .2])
    assert entry | dict(ece=None) == dict(accuracy=.75, accuracy_static=.25, accuracy_clear=1., ece=None,
                                          parse_rate=None, position_consistency=None, n_pairs=4)
    assert judge_accuracy(["A", "B"], torch.tensor([.9, .9]), gap=[.4, .3], clear=.35)["accuracy_clear"] == 1
