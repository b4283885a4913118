"""The study's machinery on a grid of seconds: what it keeps, that it resumes, and how it compares."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

STUDY = Path(__file__).parent.parent / "examples" / "study"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY))
    import run

    return run


def test_grid_resumes_and_its_runs_are_paired(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"bits": 2, "seed": [0, 1], "recipe": {"steps": 4, "float_steps": 4, "every": 2}, "initializer": ["optimal"]}

    def run(**changes: object) -> str:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump([{**grid, **changes}]))
        options = ["--results", str(tmp_path / "tiny.jsonl"), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["run.py", "--preset", str(tmp_path / "tiny.yaml"), *options])
        study.main()
        return capsys.readouterr().out

    assert "2 runs, 2 to do" in run()
    first = (tmp_path / "tiny.jsonl").read_text()
    assert "4 runs, 2 to do" in run(initializer=["optimal", "minmax"])
    text = (tmp_path / "tiny.jsonl").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 4
    (tmp_path / "tiny.jsonl").write_text(text[:-20])  # stopped while it wrote
    assert "4 runs, 1 to do" in run(initializer=["optimal", "minmax"])

    rows = study.read([tmp_path / "tiny.jsonl"])
    assert len(rows) == 4
    starts = {(row["setting"]["initializer"], row["setting"]["seed"]): row["record"] for row in rows}
    assert starts["optimal", 0]["float"] == starts["minmax", 0]["float"]
    assert [step for step, _ in starts["optimal", 0]["scores"]] == [0, 2, 4]
    assert starts["optimal", 0]["losses"] != starts["minmax", 0]["losses"]

    import compare
    from measures import MEASURES

    (cell,) = compare.cells(rows, "initializer")
    found = compare.pooled([cell], MEASURES["final"], "optimal", "minmax")
    last = {name: record["scores"][-1][1] for name, record in starts.items()}
    differences = np.array([last["optimal", seed] - last["minmax", seed] for seed in (0, 1)])
    half = 12.706204736432095 * differences.std(ddof=1) / math.sqrt(2)  # Student's 97.5 % quantile, 1 degree
    assert found is not None and found == pytest.approx((differences.mean(), half), rel=1e-9)


def test_rules_without_an_answer_are_no_runs(study: ModuleType) -> None:
    grid = {"quantizer": ["lsq", "apot"], "initializer": ["optimal", "sawb", "lsq"]}
    kept = [(setting["quantizer"], setting["initializer"]) for setting in study.settings(grid)]
    assert kept == [("lsq", "optimal"), ("lsq", "sawb"), ("lsq", "lsq"), ("apot", "optimal")]
    with pytest.raises(SystemExit, match="initialiser"):
        list(study.settings({"initialiser": "optimal"}))


def test_measures_on_a_record_made_by_hand(study: ModuleType) -> None:
    import measures

    record = {"float": 80.0, "scores": [(0, 10.0), (10, 75.9), (20, 76.0), (30, 70.0)], "blind": 2.0, "drift": 0.1}
    record["losses"] = [1.0, 5.0, None]
    assert measures.steps_to_target(record) == 20 and measures.final_score(record) == 70.0
    assert measures.mean_loss(record, 20) == 1.5 and measures.mean_loss(record, 500) == pytest.approx(5 / 3)
    assert measures.diverged(record) and not measures.diverged({**record, "losses": [1.0, 5.0, 1.9]})
    assert measures.steps_to_target({**record, "scores": [(0, 10.0), (30, 70.0)]}) == 30
    values = [1.5, -0.5, 4.0]
    half = 4.302652729749464 * np.std(values, ddof=1) / math.sqrt(3)  # 2 degrees
    assert measures.interval(values) == pytest.approx((np.mean(values), half), rel=1e-9)
    assert measures.interval([2.0, 2.1]).sign == 1 and measures.interval([2.0]).sign == 0


def test_the_long_schedule_stands_beside_what_is_published(study: ModuleType) -> None:
    import tables

    assert tables.long_table([]) == "Not run."
    grid = {"task": "cifar10-long", "bits": [2, 8], "initializer": ["optimal", "lsq"], "seed": [0, 1]}
    rows = []
    for setting in study.settings(grid):
        final = 90.0 + setting["seed"] - (setting["initializer"] == "lsq")
        record = {"float": 91.5, "scores": [(0, 10.0), (5265, final)], "losses": [1.0], "blind": 2.3, "drift": 0.1}
        rows.append({"setting": setting, "record": record})
    costs, differences = tables.long_table(rows).split("\n\n")
    assert costs.splitlines()[2:] == [
        "| lsq, optimal | -1 ± 6.4 | -1 ± 6.4 |",  # -1.5 and -0.5; Student's 12.7 times a half
        "| lsq, lsq | -2 ± 6.4 | -2 ± 6.4 |",
        "| APoT, published | -2 | - |",
    ]
    assert "| lsq, 2 bits, lsq | +0 ± 0 | +0 ± 0 | +0 ± 0 | +0 ± 0 | **+1 ± 0** |" in differences
    assert "lsq" not in tables.pooled_table(rows, "lsq")  # and it is not among the small tasks


def test_every_number_of_the_readme_is_made_from_the_results(study: ModuleType) -> None:
    import report

    text = (STUDY / "README.md").read_text()
    rows = study.read(sorted((STUDY / "results").glob("*.jsonl")))
    assert report.fill(text, rows) == text
    assert json.dumps(rows)  # plain numbers
