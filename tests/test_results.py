"What a run folder says, and what is read for it."
from dual_ipo import results
from dual_ipo.monitor import WATCHED, warnings_of
from dual_ipo.report import best_round
from dual_ipo.results import Results, read_results
from dual_ipo.store import write_table
from synthetic import synthetic_run


def test_warnings_read_no_more_than_they_look_at(tmp_path, monkeypatch):
    folder, asked, read_rows = synthetic_run(tmp_path/"run", rounds=2, n=4), [], results.read_rows
    def spy(path, columns=None):
        asked.append((path.name, columns))
        return read_rows(path, columns)
    monkeypatch.setattr(results, "read_rows", spy)
    found, told = read_results(folder), read_results(folder).warnings()
    assert asked == [("history.parquet", WATCHED)]*2
    whole = warnings_of(found.rounds, found.tables("align/history.parquet"))
    assert whole and told[:len(whole)] == whole


def graded(folder, *grades, margin=.02):
    "A run whose rounds the first judge graded, and whose losers were driven away so far."
    for k in range(1, len(grades)):
        rows = [dict(step=i, loss=.6, margin_l=margin, grad_norm=1.) for i in range(8)]
        write_table(folder/f"round_{k:02d}/align/history.parquet", rows)
    return Results(folder, {}, [dict(round=k, judge=dict(judged=grade)) for k, grade in enumerate(grades)])


def test_a_run_ends_and_its_best_round_is_said_for_the_same_reasons(tmp_path):
    run = graded(tmp_path/"a", 4.1, 4.3, 4.305, 4.5)
    assert [bool(run.reasons_to_stop(k)) for k in range(4)] == [False, False, True, False] and best_round(run) == 1
    assert best_round(graded(tmp_path/"b", 4.1, 4.3, 4.5)) == 2 and best_round(graded(tmp_path/"c", 4.1, 4.1)) == 0
    unknown = graded(tmp_path/"d", 4.1, None, 4.1)   # a grade is missing: nothing can be said
    assert not any(unknown.reasons_to_stop(k) for k in range(3)) and best_round(unknown) == 2
