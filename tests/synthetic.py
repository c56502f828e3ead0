"""A made-up run folder: real little clips and real measurements of them, invented votes and losses.
For tests and lessons, never a result."""
import math
from pathlib import Path

import torch

from dual_ipo.core import generator, write_mp4
from dual_ipo.cot import DIMENSIONS
from dual_ipo.evaluate import graded
from dual_ipo.store import write_json, write_table, write_yaml
from dual_ipo.toyworld import FPS, SHARES, measure, parse_prompt, add_defects, clean_scene, render, toy_prompts

K = 8                  # votes a pair
AGGREGATES = ("total", "quality", "semantic")


def clips(prompts, share, *keys):
    "One toy clip a prompt; `share` scales how often it has a defect or shows the wrong words."
    rng = generator("synthetic", *keys)
    words = torch.tensor([parse_prompt(p) for p in prompts])
    wrong = torch.rand(words.shape, generator=rng) < .25*share
    words = torch.where(wrong, (words + 1) % torch.tensor([6, 4, 4, 2]), words)
    return render(add_defects(clean_scene(words, rng), rng, {name: share*value for name, value in SHARES.items()}), rng)


def save(folder, name, videos, prompts, **columns):
    "Clips to mp4 and their rows, with what the truth measure says."
    scores = measure(videos, prompts)
    for i, video in enumerate(videos): write_mp4(folder/"clips"/f"{name}_{i:02d}.mp4", video, FPS)
    rows = []
    for i, prompt in enumerate(prompts):
        own = {key: float(value[i]) for key, value in scores.items()}
        rows.append(dict(prompt=prompt, clip=f"clips/{name}_{i:02d}.mp4", **columns, **own))
    return rows


def history(k, steps, margins, rng):
    "Losses that fall and margins that grow, with noise."
    rows = []
    for step in range(steps):
        x, e = 1 - math.exp(-step/20), torch.randn(4, generator=rng).tolist()
        row = dict(step=step, loss=.693 - .12*x + .02*e[0], accuracy=min(1, .5 + .22*x + .08*e[1]), skipped=False,
                   grad_norm=abs(1 + .2*e[2]))
        if not margins: row |= dict(reward=1e-4*(x + .3*e[3]))
        else:
            row |= dict(margin_w=1e-4*(1.2*x*(k > 2) - .4*x + .3*e[3]), margin_l=1e-4*(2.1*x + .3*e[0]), E_w=.04)
        rows.append(row)
    return rows


def votes(folder, k, prompts, table, sharpness, rng):
    "Each prompt's pair of clips, voted on by a judge of the given sharpness."
    rows = []
    for i, prompt in enumerate(prompts):
        a, b = table[i], table[(i + 1) % len(prompts)] if len(table) == len(prompts) else table[i + len(prompts)]
        gap = a["total"] - b["total"]
        p = 1/(1 + math.exp(-sharpness*gap))
        draws = torch.rand(K, generator=rng).tolist()
        cast = ["invalid" if u < .02 else "tie" if u < .05 else "A" if u < .05 + .95*p else "B" for u in draws]
        valid = [v for v in cast if v != "invalid"]
        p_a = sum({"A": 1, "B": 0, "tie": .5}[v] for v in valid)/len(valid)
        halves = [sum({"A": 1, "B": -1}.get(v, 0) for v in half) for half in (cast[:K//2], cast[K//2:])]
        consistent = halves[0]*halves[1] > 0
        pce = 1/(1 + math.exp(-(8*(abs(p_a - .5) - .25) + torch.randn(1, generator=rng).item())))
        label = "tie" if not consistent else "A" if p_a > .5 else "B"
        rows.append(dict(pair_id=f"{k}-{i}", prompt=prompt, clip_a=a["clip"], clip_b=b["clip"], label=label, p_a=p_a,
                         n_valid=len(valid), n_votes=K, consistent=consistent, votes=cast, pce=pce, kept=pce > .5,
                         weight=pce, truth="A" if gap > 0 else "B", gap=abs(gap)))
    return rows


def opinion(folder, k, scored, base, rng):
    "The first judge's grades of the clips, and the round's `graded` entry."
    rows = []
    for row in scored:
        own = [min(5, 3 + .2*k + .3*x) for x in torch.randn(len(DIMENSIONS), generator=rng).tolist()]
        known = {key: row[key] for key in ("prompt", "candidate", "clip")}
        rows.append(known | dict(grade=sum(own)/len(own), frame_change=4 + .1*k) | dict(zip(DIMENSIONS, own)))
    write_table(folder/"judge_check/grades.parquet", rows)
    return graded(rows, base, DIMENSIONS), rows


def right(rows):
    "Share of votes that are right."
    return sum((row["p_a"] > .5) == (row["truth"] == "A") for row in rows)/len(rows)


def synthetic_run(
    folder,            # made
    rounds=3,
    n=16,              # prompts
    objective="dpo",   # or "kto"
    margins=True,      # False: an objective that writes none
    truth=True,        # False: nobody measured anything
    quarantine=True,
):
    "Write a run folder as the loop would leave it."
    folder = Path(folder)
    config = dict(
        seed=0, rounds=rounds,
        generator=dict(path="checkpoints/wan_small", lora_rank=16), judge=dict(path="checkpoints/judge"),
        candidates=dict(prompts_per_round=n, per_prompt=4),
        align=dict(objective=objective, steps=60, batch_size=16, lr=3e-5, beta=2000., lambda_win=.1, lambda_real=0.),
        votes=dict(k=K, pairs=n),
        evaluate=dict(measure="dual_ipo.toyworld:measure" if truth else None, prompts=n, clips_per_prompt=2))
    write_yaml(folder/"run.yaml", config)
    prompts, train, entries, base = toy_prompts(n, "eval"), toy_prompts(n, "train"), [], None
    for k in range(rounds + 1):
        rng, share, at = generator("votes", k), 1 - .22*k, folder/f"round_{k:02d}"
        scored = []
        for i in (0, 1):
            scored += save(at/"evaluate", f"s{i}", clips(prompts, share, k, i), prompts, candidate=i)
        if not truth: scored = [{key: row[key] for key in ("prompt", "candidate", "clip")} for row in scored]
        write_table(at/"evaluate/scores.parquet", scored)
        names = [key for key in scored[0] if key not in ("prompt", "candidate", "clip")]
        means = {key: 100*sum(row[key] for row in scored)/len(scored) for key in names}
        entry = dict(round=k, generator={}, judge={}, seconds=dict(cold_start=14., evaluate=6.) if k == 0 else
            dict(candidates=11 + k, judging=6.5, align=21., pseudo_label=7.2, srpo=9.1, evaluate=6.))
        entry["graded"], rows = opinion(at, k, scored, base, generator("opinion", k))
        base, entry["truth"] = base or rows, "measure" if truth else None
        if truth:
            entry["generator"] = {key: means[key] for key in (*AGGREGATES, "dynamic_degree")} | dict(
                dims={key: value for key, value in means.items() if key not in AGGREGATES},
                ci95=[means["total"] - 2.1, means["total"] + 2.1], n_clips=2*n)
            rows = votes(at, k, prompts, scored, 6 + 3*k, rng)
            static = votes(at, k, prompts, scored, 6, rng)
            keys = ("pair_id", "prompt", "label", "p_a", "n_valid", "n_votes", "consistent", "votes", "truth", "gap")
            table = []
            for row, s in zip(rows, static): table.append({key: row[key] for key in keys} | dict(p_a_static=s["p_a"]))
            write_table(at/"evaluate/votes.parquet", table)
            entry["judge"] = dict(
                accuracy=right(rows), accuracy_static=right(static), accuracy_clear=min(1, right(rows) + .08),
                ece=.08 - .01*k, parse_rate=.98, position_consistency=.8 + .02*k, n_pairs=n, judged=4 + .2*k)
        if k:
            shard = at/"candidates/shard_0000"
            table = []
            for c in range(4):
                made = save(shard, f"c{c}", clips(train, share + .22, k, "c", c), train)
                table += [row | dict(candidate=c, clip=f"shard_0000/{row['clip']}") for row in made]
            keys = ("prompt", "candidate", "clip")
            write_table(shard/"table.parquet", [{key: row[key] for key in keys} for row in table])
            for row in table:
                score = .7*row["total"] + .3*torch.rand(1, generator=rng).item()
                row |= dict(score=score)
            scores = [{key: r[key] for key in ("prompt", "candidate", "clip", "score")} for r in table]
            for row, r in zip(scores, table): row["motion"] = r["dynamic_degree"]
            write_table(at/"scores.parquet", scores)
            pairs = []
            for prompt in train:
                own = sorted((r for r in table if r["prompt"] == prompt), key=lambda r: r["score"])
                w, l = own[-1], own[0]
                pair = dict(prompt=prompt, clip_w=w["clip"], clip_l=l["clip"], score_w=w["score"], score_l=l["score"])
                pairs.append(pair | (dict(total_w=w["total"], total_l=l["total"]) if truth else {}))
            write_table(at/"pairs.parquet", pairs)
            table = [row | dict(clip=f"candidates/{row['clip']}") for row in table]   # as seen from the round's folder
            table = votes(at, k, train, table, 8 + 2*k, rng)
            for row in table: del row["truth"], row["gap"]
            write_table(at/"votes.parquet", table)
            write_table(at/"align/history.parquet", history(k, 60, margins, rng))
            entry["trained"] = dict(accuracy=.7)
            entry["voted"] = dict(pairs=len(table), kept=sum(row["kept"] for row in table), readable=.98)
        if k == rounds: entry["extra_srpo"] = ["(made up) implicit accuracy ended at 0.93"]
        write_json(at/"round.json", entry)
        entries.append(entry)
    write_json(folder/"summary.json", dict(config=config, rounds=entries))
    bad = [dict(clip="clips/0042.mp4", reason="is truncated: 5 of 9 frames; fetch it again")]
    if quarantine: write_table(folder/"quarantine.parquet", bad)
    return folder
