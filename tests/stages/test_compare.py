import csv
import html
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.evaluation.test_tables import GAIN, LOSS, ROWS, against, ranked, report
from tests.tables import publish
from trackrec import storage
from trackrec.data import schema
from trackrec.evaluation import plots
from trackrec.evaluation import report as reports
from trackrec.evaluation.report import Report
from trackrec.stages import compare, gather

HOSTILE = "<script>alert('title')</script>"


class _Nothing(BaseModel):
    pass


def whole() -> Report:
    found = report(
        *against(LOSS, "dcn", iteration=1),
        *against(GAIN, iteration=0),
        against(GAIN, iteration=1)[1],
        ranked("din", "shuffled", [0.7, 0.71, 0.72], iteration=1),
        ranked("dien", "none", [None, None, None]),
        ranked("dien", "recot", [None, None, None], iteration=1),
        ranked("din", "recot", [0.7, 0.71, 0.72], iteration=0, variant="no alignment"),
        rows=ROWS,
    )
    found.rankings[-2].ranking.roc = None
    return found


def published(directory: Path, found: Report) -> Path:
    with storage.publish("tabulate", _Nothing(), inputs={}, outputs={"report": directory}) as job:
        reports.write(job.outputs["report"], found)
    return directory


def texts(directory: Path, names: str, text: str) -> Path:
    rows = [{"context_id": name, "sample": 0, "text": f"{text} of {name}"} for name in names]
    return publish(directory, recots=[*rows, {"context_id": names[0], "sample": 1, "text": "another sample"}])


def decoded(directory: Path, tokens: dict[str, int], facts: dict[str, float]) -> Path:
    """Greedy RecCoTs of so many tokens by context, 80 being the limit; of each another sample, which nothing reads."""
    rows = [
        {
            "context_id": name,
            "sample": sample,
            "text": "text",
            "num_tokens": count + sample,
            "finish_reason": "length" if count == 80 else "stop",
        }
        for name, count in tokens.items()
        for sample in (0, 1)
    ]
    return publish(directory, facts=facts, recots=rows)


def contexts(directory: Path, names: str) -> Path:
    history = [{"title": f"{HOSTILE} {n}", "rating": 4.5 if n % 2 else None, "label": n % 2} for n in range(20)]
    shared = {"user_id": "u", "as_of": 1, "split": "test", "domain": "movies"}
    return publish(directory, contexts=[{"context_id": name, "history": history, **shared} for name in names])


def made(root: Path, found: Report, **given: Any) -> Path:
    compare.run(
        report=published(root / "report", found),
        contexts=contexts(root / "contexts", "abcdefg"),
        results=root / "results",
        **given,
    )
    return root / "results"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return made(
        tmp_path,
        whole(),
        before=texts(tmp_path / "before", "gfedcb", f"early {HOSTILE}"),
        after=texts(tmp_path / "after", "abcdef", "late " + "x" * 3000),
        examples=2,
    )


def page(results: Path) -> str:
    return (results / "report.html").read_text(encoding="utf-8")


def rows(results: Path, name: str) -> list[dict[str, str]]:
    with (results / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_page_needs_nothing_from_outside(results: Path) -> None:
    text = page(results)
    # But for the name of the header that forbids it.
    assert "http" not in text.replace("http-equiv", "")
    assert "src=" not in text and "url(//" not in text and "@import" not in text
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert '<meta name="viewport"' in text


def test_every_reference_of_the_page_has_its_target_once(results: Path) -> None:
    text = page(results)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)} <= set(ids)


def test_titles_and_texts_are_escaped(results: Path) -> None:
    text = page(results)
    assert "<script" not in text
    assert text.count(html.escape(HOSTILE, quote=False).replace("'", "&#39;")) == 2 * 15 + 2


def test_examples_are_the_first_that_both_have(results: Path) -> None:
    text = page(results)
    assert re.findall(r"<h3>Context (.)</h3>", text) == ["b", "c"]
    assert "chosen neither by hand nor by result" in text
    # "late ", 3000 x and " of b" are 3010 characters.
    assert text.count("cut here: 1010 more characters") == 2
    assert "another sample" not in text
    assert "5 earlier items are not shown" in text and '<ol start="6">' in text
    assert "(liked, rated 4.5)" in text and "(not liked)" in text


def test_figures_have_alternative_texts(results: Path) -> None:
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page(results))
    # Two forests, V's and DIN's curves, tokens, ROC and calibration of DCN and DIN, and DIEN's calibration.
    assert len(labels) == 2 + 4 + 1 + 5 == page(results).count("<svg")
    assert any("DCN -0.0120" in label and "worse" in label for label in labels)


def test_losses_show_as_plainly_as_gains(results: Path) -> None:
    text = html.unescape(page(results))
    verdict = (
        "With the RecCoT, AUC is higher on 1 of 3 backbones (DIN), lower on 1 (DCN), and not to be told apart on 0; "
        "not tested on 1 (DIEN) (p < 0.05, paired t-test over 3 seeds)."
    )
    assert verdict in text and verdict in (results / "rankings.md").read_text()
    assert text.index(verdict) < text.index("<table>")
    assert "<b>worse</b>" in text and "0.6980−" in text
    assert "AUC of DIEN on all rows (against no RecCoT)" in text and "all rows have label 1." in text
    facts = storage.read_manifest(results).facts
    assert facts["better"] > 0 and facts["worse"] > 0


def test_csv(results: Path) -> None:
    assert {path.stem for path in results.glob("*.csv")} == {
        "table2", "controls", "table4", "figure5", "figure5_gain", "table6", "tokens", "rankings", "hyperparameters",
    }  # fmt: skip
    [din] = [r for r in rows(results, "table2") if (r["model"], r["metric"]) == ("DIN", "auc")]
    assert (float(din["base"]), float(din["ours"]), din["mark"]) == (pytest.approx(0.71), pytest.approx(0.722), "+")
    assert (din["outcome"], din["seeds"]) == ("better", "3") and float(din["p_value"]) == pytest.approx(
        0.0091, abs=1e-4
    )
    [dien] = [r for r in rows(results, "table2") if (r["model"], r["metric"]) == ("DIEN", "auc")]
    assert (dien["base"], dien["p_value"], dien["reason"]) == ("", "", "all rows have label 1")
    assert rows(results, "tokens")[1] == {"iteration": "1", "mean_tokens": "80.0", "cut": "0.0"}
    long = rows(results, "rankings")
    # Nine arms, three seeds, four slices, five metrics.
    assert len(long) == 9 * 3 * 4 * 5
    assert long[0] == {
        "variant": "full", "iteration": "", "backbone": "dcn", "feature": "none", "seed": "0", "slice": "overall",
        "metric": "auc", "value": "0.7", "reason": "",
    }  # fmt: skip
    searched = rows(results, "hyperparameters")
    assert len(searched) == 9 * 2
    assert (searched[0]["chosen"], searched[1]["chosen"], searched[0]["valid_auc"]) == ("True", "False", "0.699")


def test_markdown(results: Path) -> None:
    lines = (results / "rankings.md").read_text().splitlines()
    assert lines[2].startswith("| | base | AUC base | AUC ours | UAUC base |")
    assert lines[4].startswith("| DCN | no RecCoT | 0.7100 | 0.6980− |")
    assert lines[6].startswith("| DIEN | no RecCoT | – | – |")
    assert "tests were made" in lines[-1]


def test_the_same_bytes_again(tmp_path: Path, results: Path) -> None:
    before = storage.content_hash(results)
    compare.run(
        report=tmp_path / "report",
        contexts=tmp_path / "contexts",
        before=tmp_path / "before",
        after=tmp_path / "after",
        results=tmp_path / "again",
        examples=2,
    )
    assert storage.content_hash(tmp_path / "again") == before


def test_efficiency(tmp_path: Path) -> None:
    untuned = decoded(tmp_path / "untuned", {"a": 80, "b": 70, "c": 60}, {"decoded": 3, "seconds_per_recot": 1.5})
    after = decoded(tmp_path / "after", {"a": 50, "b": 41, "c": 29}, {"decoded": 2, "seconds_per_recot": 0.75})
    results = made(tmp_path, report(rows=ROWS), untuned=untuned, after=after)
    assert rows(results, "efficiency") == [
        {
            "model": "untuned", "recots": "3", "mean_tokens": "70.0", "p95_tokens": "79.0", "cut": "0.3333333333333333",
            "seconds": "1.5", "timed": "3",
        },
        {
            "model": "aligned", "recots": "3", "mean_tokens": "40.0", "p95_tokens": "49.1", "cut": "0.0",
            "seconds": "0.75", "timed": "2",
        },
    ]  # fmt: skip
    assert "| aligned | 3 | 40.0 | 49.1 | 0% | 0.750 |" in (results / "efficiency.md").read_text()
    text = page(results)
    assert 'id="efficiency"' in text and 'href="#efficiency"' in text
    verdict = "RecCoTs are shorter: 40.0 tokens against 70.0 of the untuned model"
    assert text.count(verdict) == 1 and "one takes 0.750 s against 1.500 s (0.50 times)" in text
    assert storage.read_manifest(results).inputs.keys() == {"report", "contexts", "after", "untuned"}


class _Limit(BaseModel):
    max_tokens: int


@pytest.mark.parametrize(("limit", "seconds"), [(80, ["1.5", "0.75"]), (40, ["", ""])])
def test_seconds_of_gathered_texts_compare_under_the_parts_settings(
    limit: int, seconds: list[str], tmp_path: Path
) -> None:
    """Two pods wrote a side's texts; what their settings were, the joined table's manifest says."""
    sides = {}
    for side, pace, max_tokens in (("untuned", 1.5, 80), ("after", 0.75, limit)):
        parts = [tmp_path / f"{side} {number}" for number in range(2)]
        for number, part in enumerate(parts):
            row = {"context_id": "ab"[number], "sample": 0, "text": "text", "num_tokens": 30, "finish_reason": "stop"}
            with storage.publish("generate", _Limit(max_tokens=max_tokens), inputs={}, outputs={"out": part}) as job:
                schema.write(job.outputs["out"], "recots", [row])
                job.facts |= {"shard": number, "shards": 2, "decoded": 1, "seconds_per_recot": pace}
        sides[side] = tmp_path / side
        gather.run(table="recots", parts=parts, joined=sides[side])
    results = made(tmp_path, report(rows=ROWS), **sides)
    assert [row["seconds"] for row in rows(results, "efficiency")] == seconds
    assert ("under different settings" in page(results)) == (limit != 80)


def test_without_an_untuned_generator_there_is_no_efficiency(results: Path) -> None:
    assert not (results / "efficiency.csv").exists() and not (results / "efficiency.md").exists()
    assert "efficiency" not in page(results)


def test_without_rankings(tmp_path: Path) -> None:
    results = made(tmp_path, report(rows=ROWS))
    assert {path.stem for path in results.glob("*.csv")} == {
        "table2", "controls", "table4", "figure5", "figure5_gain", "tokens",
    }  # fmt: skip
    text = page(results)
    assert 'id="validator"' in text and "item mean (baseline)" in text
    for section in ("table6", "table7", "iteration", "curves", "examples"):
        assert f'"{section}"' not in text and f'"#{section}"' not in text


def test_without_validator(tmp_path: Path) -> None:
    after = texts(tmp_path / "after", "ab", "text")
    results = made(tmp_path, report(*against(GAIN)).model_copy(update={"examples": 0}), after=after)
    text = page(results)
    assert 'id="validator"' not in text and 'id="tokens"' not in text and "V is measured" not in text
    assert 'id="table2"' in text and text.count("<h4>RecCoT</h4>") == 2
    assert "Train labels reach G" in text and "bootstrap over users" not in text


def test_a_bin_of_few_rows_is_not_drawn() -> None:
    base, ours = (found.ranking for found in against(GAIN))
    assert plots.calibration(base, ours) is not None
    [many, few] = [bin.model_copy(update={"rows": rows}) for bin, rows in zip(ours.calibration, (30, 29), strict=True)]
    drawn = plots.calibration(base, ours.model_copy(update={"calibration": [many, few]}))
    assert drawn is not None and "(30 rows)" in drawn.alt and "(29 rows)" not in drawn.alt
    assert plots.calibration(base, ours.model_copy(update={"calibration": [few]})) is None


def test_with_the_baseline_alone(tmp_path: Path) -> None:
    results = made(tmp_path, report(rows=ROWS[:1]))
    assert not list(results.glob("*.csv"))
    assert "holds nothing to compare" in page(results) and "item mean (baseline)" in page(results)


def test_contexts_of_other_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks context z"):
        made(tmp_path, report(rows=ROWS), after=texts(tmp_path / "after", "az", "text"))
    assert not (tmp_path / "results").exists()
