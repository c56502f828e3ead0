"`help` of what the package exports says what every parameter is."
import inspect

import pytest

import dual_ipo
from dual_ipo.documented import parameters_of


def callables(name):
    "The function, or the fields and own methods of a class."
    x = getattr(dual_ipo, name)
    if not inspect.isclass(x): return {name: x}
    is_data = hasattr(x, "__dataclass_fields__")
    found = {name: x} if is_data else {}
    for part in vars(x):
        f = getattr(x, part)
        f = getattr(f, "__func__", f)   # of a class method
        own = inspect.isfunction(f) and (not part.startswith("_") or part == "__init__" and not is_data)
        if own and f.__module__.startswith("dual_ipo"): found[f"{name}.{part}"] = f
    return found


@pytest.mark.parametrize("name", dual_ipo.__all__)
def test_help_knows_every_parameter(name):
    for path, f in callables(name).items():
        doc = inspect.getdoc(f)
        assert doc, path
        for names, said in parameters_of(f):
            assert said or all(f"`{one}`" in doc for one in names.split(", ")), f"{path}: {names} has no comment"
            if said: assert f"{names}: {said}" in doc, path


def test_class_methods_are_known_too():
    assert {"Run.open", "Run.load"} <= callables("Run").keys() and "Judge.load" in callables("Judge")
    assert "config: everything that decides the results" in inspect.getdoc(dual_ipo.Run.open)


def test_nothing_is_read_for_those_who_do_not_ask():
    from dual_ipo.reward import Judge
    assert inspect.getdoc(Judge.vote).startswith("K sampled responses") and dual_ipo.Judge is Judge
