"Tables that stay columns, shards that stay on disk: the bytes and the digests of rows that are all in memory."
import hashlib
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dual_ipo.candidates import make_pairs
from dual_ipo.cluster import rows_in_shards
from dual_ipo.core import UserError, generator
from dual_ipo.results import Results
from dual_ipo.size import measured
from dual_ipo.stats import bootstrap_cis
from dual_ipo.store import (AT_ONCE, Each, Rows, arrow_of, digest, read_rows, read_table, read_tables, rows_checksum,
                            stream_table, write_table)


def awkward(i):
    "A row whose columns come late, are None at first, or turn out to be of another type."
    row = dict(i=i, text="abc"*(i % 9), x=i/3 if i % 7 else None, nothing=None, some=["A", "B"][:i % 3], none=[],
               parts=[dict(a=1, ids=list(range(i % 5)), p=None if i < 700 else .5)]*(i % 3), yes=bool(i % 2))
    if i > 800: row |= dict(late="z", number=1 if i < 1500 else 2.5)
    if i > 1900: row |= dict(deep=dict(a=None, b=[1]))
    return row


@pytest.mark.parametrize("n", [0, 1, AT_ONCE, AT_ONCE + 1, 2500])
def test_a_table_has_the_bytes_of_one_that_is_made_at_once(tmp_path, n):
    rows, columns = [awkward(i) for i in range(n)], {}
    for row in rows: columns |= dict.fromkeys(row)
    table = pa.table({key: [row.get(key) for row in rows] for key in columns})
    table = table.replace_schema_metadata({"rows_crc32": rows_checksum(table.to_pylist())})
    pq.write_table(table, tmp_path/"whole.parquet", write_page_checksum=True)
    write_table(tmp_path/"few.parquet", map(awkward, range(n)))
    assert (tmp_path/"few.parquet").read_bytes() == (tmp_path/"whole.parquet").read_bytes()
    found = table.to_pylist()
    assert list(stream_table(tmp_path/"few.parquet")) == read_table(tmp_path/"few.parquet") == found
    text = json.dumps((rows, 3, {"a": [1]}), sort_keys=True, default=str)
    assert digest(rows, 3, {"a": [1]}) == hashlib.sha256(text.encode()).hexdigest()
    assert digest(Rows(table)) == digest(found)


def test_rows_are_as_a_list(tmp_path):
    "Every slice, place and order of them; so is what a function makes of each, and what lies in shards."
    rng, rows = random.Random(0), [dict(i=i, text=str(i)) for i in range(1300)]
    shards = rows_in_shards(range(1300), 100, tmp_path, "shards", lambda some: [rows[i] for i in some])
    tables = read_tables(sorted(tmp_path.glob("*/table.parquet")))
    for lazy in (Rows(arrow_of(rows)), Each(lambda i: rows[i], range(1300)), shards, tables):
        assert lazy == rows and list(lazy) == rows and lazy != rows[1:] and len(lazy) == 1300
        for _ in range(30):
            a, b, step = rng.randint(-1400, 1400), rng.randint(-1400, 1400), rng.choice([1, 1, 2, -1, -7])
            assert list(lazy[a:b:step]) == rows[a:b:step] and list(lazy[a:]) == rows[a:] and list(lazy[:b]) == rows[:b]
        assert lazy[-1] == rows[-1] and rows[7] in lazy and lazy.index(rows[1200]) == 1200
        with pytest.raises(IndexError): lazy[1300]


def test_damage_that_no_page_shows_ends_a_stream(tmp_path):
    table = pa.table(dict(x=[1, 2, 3]))
    pq.write_table(table.replace_schema_metadata({"rows_crc32": "00000000"}), tmp_path/"t.parquet")
    for read in (lambda path: list(stream_table(path)), read_rows):
        with pytest.raises(UserError, match="t.parquet: is damaged .*its rows are not those that were written"):
            read(tmp_path/"t.parquet")
    data = bytearray((tmp_path/"t.parquet").read_bytes())
    (tmp_path/"t.parquet").write_bytes(data[:len(data)//2])
    with pytest.raises(UserError, match="t.parquet: is damaged"): list(stream_table(tmp_path/"t.parquet"))
    with pytest.raises(UserError, match="none.parquet: no such file"): read_rows(tmp_path/"none.parquet")


def test_the_report_reads_no_paths(tmp_path):
    "A column that is not asked for is not even decoded: its pages may be anything."
    rows = [dict(label="A", paths=["x"*5000 + str(i)]) for i in range(200)]
    write_table(tmp_path/"round_01/votes.parquet", rows)
    results = Results(tmp_path, {}, [])
    assert results.rows(1, "votes.parquet", ["label", "pce"]) == [dict(label="A")]*200
    data = bytearray((tmp_path/"round_01/votes.parquet").read_bytes())
    chunk = pq.read_metadata(tmp_path/"round_01/votes.parquet").row_group(0).column(1)
    assert chunk.path_in_schema.startswith("paths")
    place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size//2
    data[place:place + 10] = bytes(255 - x for x in data[place:place + 10])
    (tmp_path/"round_01/votes.parquet").write_bytes(data)
    assert results.tables("votes.parquet", ["label"]) == {1: [dict(label="A")]*200}
    with pytest.raises(UserError, match="damaged"): results.tables("votes.parquet")


def test_intervals_are_those_of_all_draws_at_once(monkeypatch):
    values, groups = torch.randn(900, dtype=torch.float64), [str(i % 300) for i in range(900)]
    total, count = torch.zeros(300, dtype=torch.float64), torch.full((300,), 3.)
    for i, value in enumerate(values): total[i % 300] += value
    draws = torch.randint(300, (2000, 300), generator=generator("bootstrap", 0))
    means = total[draws].sum(1)/count[draws].sum(1)
    whole = tuple(torch.quantile(means, torch.tensor([.025, .975], dtype=torch.float64)).tolist())
    for size in (2**22, 300, 7*300 + 1):
        monkeypatch.setattr("dual_ipo.stats.DRAWS", size)
        assert bootstrap_cis(dict(a=values, b=-values), groups)["a"] == pytest.approx(whole, abs=1e-15)


def test_a_stream_holds_a_few_rows(tmp_path):
    "Three thousand votes of two thousand tokens are 200 MB as Python's lists."
    write_table(tmp_path/"t.parquet", (dict(ids=list(range(300 + i, 2300 + i))) for i in range(3000)))
    def peak(read): return measured(lambda: sum(len(row["ids"]) for row in read(tmp_path/"t.parquet")))["peak_mb"]
    assert peak(stream_table) < .65*peak(read_table)


def test_pairs_are_as_before_in_any_order():
    "Candidates of a prompt need not stand together; those without a score, and lone ones, make no pair."
    rng, rows, scores = random.Random(0), [], []
    for i in range(3000):
        rows.append(dict(prompt_index=rng.randrange(700), candidate=i, prompt="p", named="0", round=1, name=str(i),
                         clip=f"{i}.mp4", latents="l"))
        scores.append(rng.choice([rng.random(), .5, float("nan")]))
    wanted = []
    for index in dict.fromkeys(row["prompt_index"] for row, score in zip(rows, scores) if score == score):
        own = [i for i in range(3000) if rows[i]["prompt_index"] == index and scores[i] == scores[i]]
        w, l = max(own, key=scores.__getitem__), min(own, key=scores.__getitem__)
        if scores[w] > scores[l]: wanted.append((index, str(w), str(l), scores[w], scores[l], len(own)))
    pairs = make_pairs(Rows(arrow_of(rows)), scores)
    found = [[pair[key] for key in ("prompt_index", "name_w", "name_l", "score_w", "score_l", "n_scored")]
             for pair in pairs]
    assert found == list(map(list, wanted)) and len(found) > 300
