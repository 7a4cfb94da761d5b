"""A read-out as the paper's Table 4, as CSV and as JSON."""

import csv
import io
from pathlib import Path

from trackrec.abtest.readout import Metric, Readout, Row, Slice

JSON, CSV, MARKDOWN = "abtest.json", "abtest.csv", "abtest.md"
ABSENT = "–"
# The paper's mark.
STRONG = 0.001
_HEADS: dict[Metric, str] = {"revenue": "Revenue", "cvr": "CVR"}
_SETTINGS: tuple[Slice, ...] = ("long-tail", "all")


def write(directory: Path, found: Readout) -> None:
    """`abtest.json`, `abtest.csv` and `abtest.md`."""
    rows = io.StringIO()
    writer = csv.DictWriter(rows, fieldnames=list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in found.results)
    files = {JSON: found.model_dump_json(indent=2) + "\n", CSV: rows.getvalue(), MARKDOWN: markdown(found)}
    for name, text in files.items():
        (Path(directory) / name).write_text(text, encoding="utf-8")


def verdict(found: Readout) -> str:
    """Whether the buckets are as large as they were to be, in one sentence."""
    shares = (
        f"{found.observed_share:.2%} of the users are in {found.treatment!r}, {found.expected_share:.2%} were to be "
        f"(chi-square, p = {found.sample_ratio_p_value:.2g})"
    )
    if found.mismatch:
        return (
            f"SAMPLE RATIO MISMATCH: DO NOT READ THE LIFTS. {shares}. The buckets are not the ones that were "
            "randomised: look for users lost or logged twice on one side, bots, or other shares than the test had."
        )
    return f"The sample ratio is as designed: {shares}."


def markdown(found: Readout) -> str:
    """The verdict on the sample ratio, Table 4, every number behind it, and what to know when reading them."""
    settings = [where for where in _SETTINGS if any(row.slice == where for row in found.results)]
    lines = [f"**{verdict(found)}**" if found.mismatch else verdict(found), ""]
    lines += ["| Method | Setting | Revenue | CVR |", "| :--- | :--- | ---: | ---: |"]
    for where in settings:
        lines.append(f"| {_escaped(found.control)} | {where} | - | - |")
    for where in settings:
        cells = [_cell(row, found) for row in found.results if row.slice == where]
        lines.append(f"| {_escaped(found.treatment)} | {where} | {' | '.join(cells)} |")
    level = f"{found.confidence * 100:g} %"
    lines += [
        "",
        f"| | setting | control | treatment | lift | {level} interval | by bootstrap | p | A/A rejected | "
        "CUPED removed |",
        "| :--- | :--- |" + " ---: |" * 8,
    ]
    for row in found.results:
        cells = [
            _number(row.control, ".6g"),
            _number(row.treatment, ".6g"),
            _number(row.lift, "+.2%"),
            _interval(row.low, row.high),
            _interval(row.bootstrap_low, row.bootstrap_high),
            _number(row.p_value, ".2g"),
            _number(row.halvings_rejected, ".1%"),
            _number(row.variance_removed, ".1%"),
        ]
        lines.append(f"| {_HEADS[row.metric]} | {row.slice} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(found))]) + "\n"


def notes(found: Readout) -> list[str]:
    """What a reader must know to judge the numbers."""
    said = [
        f"Revenue is per user, CVR per {found.cvr_per}. Users: "
        + ", ".join(f"{_escaped(name)} {count}" for name, count in found.users.items())
        + f"; of {found.rows} rows.",
        f"`*` p < {STRONG}, `+` p < {1 - found.confidence:.2g} and higher; `−` p < {1 - found.confidence:.2g} and "
        f"lower. {len(found.results)} tests were made, not corrected for their number.",
    ]
    if found.dropped_in_two_buckets:
        share = found.dropped_in_two_buckets / (found.dropped_in_two_buckets + sum(found.users.values()))
        said.append(
            f"{found.dropped_in_two_buckets} users ({share:.2%}) are in two buckets or more, and dropped. More than a "
            "few say that users are not bucketed by their id, or that shares changed during the test."
        )
    if found.in_no_bucket:
        said.append(f"{found.in_no_bucket} users are in no bucket of the experiment.")
    for name, count in found.without_value.items():
        without = f", which {count} users lack: these are given the mean of the others" if count else ""
        said.append(f"CUPED by {_escaped(name)}{without}.")
    if found.resamples:
        said.append(f"The bootstrap resamples users {found.resamples} times; seed {found.seed}.")
    if found.halvings:
        said.append(
            f"A/A: {found.halvings} random halvings of the control; of these tests {1 - found.confidence:.2g} should "
            "reject, and many more mean that the intervals are too narrow for these users."
        )
    said += [f"{_HEADS[row.metric]} ({row.slice}): no lift, as {row.reason}." for row in found.results if row.reason]
    return said


def _cell(row: Row, found: Readout) -> str:
    if row.lift is None or row.p_value is None:
        return ABSENT
    mark = ""
    if row.p_value < 1 - found.confidence:
        mark = "−" if row.lift < 0 else "*" if row.p_value < STRONG else "+"
    return f"{row.lift:+.1%}{mark} {_interval(row.low, row.high, '+.1%')}"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _interval(low: float | None, high: float | None, form: str = "+.2%") -> str:
    return ABSENT if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _escaped(name: str) -> str:
    """A bucket's name is the log's."""
    return name.replace("\\", r"\\").replace("|", r"\|").replace("\n", " ")
