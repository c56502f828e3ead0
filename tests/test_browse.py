"The pairs on a report's page: chosen before they are read."
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dual_ipo.browse import MOST, views_of
from dual_ipo.results import Results


def run_of(folder, n, each=8):
    "Tables of n prompts, without clips."
    words, numbers = [f"a red panda on a boat, number {i}" for i in range(n)], torch.rand(n*each).numpy()
    clips = [f"shard_{i//8:04d}/clips/{i:06d}_{j:02d}.mp4" for i in range(n) for j in range(each)]
    base = dict(prompt=words*2, candidate=[0]*n + [1]*n, clip=["a.mp4"]*2*n, total=numbers[:2*n])
    pairs = dict(prompt=words, clip_w=clips[::each], clip_l=clips[3::each], score_w=numbers[:n] + 1,
                 score_l=numbers[n:2*n])
    tables = {"round_01/scores": dict(clip=clips, score=numbers, motion=numbers), "round_01/pairs": pairs,
              "round_00/evaluate/scores": base, "round_01/evaluate/scores": base}
    for name, columns in tables.items():
        path = folder/f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
    return Results(folder, {"judge": {"dimensions": ["motion"]}}, [dict(round=0), dict(round=1)])


def looked(results):
    "The views, and the bytes of Python's that they took at most."
    tracemalloc.start()
    try: return views_of(results), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def test_ten_times_the_pairs_do_not_take_ten_times_the_memory(tmp_path):
    (few, small), (many, large) = (looked(run_of(tmp_path/str(n), n)) for n in (MOST, 10*MOST))
    assert large < 2*small
    for views in (few, many):
        assert [*map(len, views.values())] == [MOST, MOST]
        taught, _ = views.values()
        for item in taught: assert {"margin", "motion"} <= item.numbers.keys()   # every pair has found its grades
    assert many["what round 1 was taught"][-1].prompt.endswith(f" {10*MOST - 1}")


@pytest.mark.parametrize("lost", ["round_01/scores", "round_01/evaluate/scores", "round_00/evaluate/scores"])
def test_a_table_that_is_not_there_takes_its_part_alone(tmp_path, lost):
    results = run_of(tmp_path, 3)
    (tmp_path/f"{lost}.parquet").unlink()
    views = views_of(results)
    assert len(views["what round 1 was taught"]) == 3
    assert len(views["before and after"]) == (0 if "evaluate" in lost else 6)
