"""What was found, to read."""

from __future__ import annotations

from typing import Any

from mlx_hybridcache.verify import GREEDY_TOKENS

Parts = dict[str, dict[str, Any]]


def failures(parts: Parts) -> list[str]:
    """Everything that must hold and does not, and every part that did not come to its end."""
    failed = []
    for name, part in parts.items():
        failed += [f"{name}: {what}" for what, row in _rows(part) if not row.get("holds", True)]
        if part["ended"] != "status 0":
            failed.append(f"{name}: {part['ended']}")
    return failed


def readable(found: dict[str, Any]) -> str:
    """Markdown: the machine, the sentences that matter, a table for each part."""
    machine, parts = found["machine"], found["parts"]
    lines = [
        f"# On {machine['device']}",
        "",
        ", ".join(machine[what] for what in ("os", "chip", "date"))
        + f"; Python {machine['python']}, mlx {machine['mlx']}, mlx-lm {machine['mlx_lm']}.",
        "",
        *(f"* {sentence}" for sentence in _sentences(parts)),
        *(f"* FAILED: {each}" for each in found["failed"]),
    ]
    for name, part in parts.items():
        lines += ["", f"## {name} ({part['seconds']:.0f} s, {part['ended']})", ""]
        lines += _table(_rows(part)) if "found" in part else ["```text", part["said"], "```"]
        if "found" in part and part["ended"] != "status 0":
            lines += ["", "```text", part["said"], "```"]
    return "\n".join(lines) + "\n"


def _rows(part: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list((part.get("found") or {}).items())


def _sentences(parts: Parts) -> list[str]:
    rows = [(name, row) for part in parts.values() for name, row in _rows(part)]
    exact = [row for name, row in rows if name.endswith(", exact")]
    default = [row for name, row in rows if name.endswith(", default")]
    replies = [row for _, row in rows if "differing" in row]
    said = []
    if exact:
        differ = sum(row["points_that_differ"] for row in exact)
        points = sum(row["points"] for row in exact)
        said.append(f"exact mode: {differ} restore points with differing logits, of {points}")
    if replies:
        said.append(
            f"exact mode's replies: {sum(row['differing'] for row in replies):,} of "
            f"{sum(row['compared'] for row in replies):,} log-probabilities differ, in "
            f"{sum(row['replies'] for row in replies)} replies"
        )
    if default:
        said.append(
            f"default mode: at {sum(row['points'] for row in default)} restore points hot differs from "
            f"cold by at most {max(row['worst'] for row in default):.3g}, cold from cold in other "
            f"slices by at most {max(row['cold_against_cold'] for row in default):.3g}; the first "
            f"{GREEDY_TOKENS} greedy tokens differ at {sum(row['other_tokens'] for row in default)} of them"
        )
    said += [
        f"{name}: {row['that_differ']:,} of {row['logits']:,} logits differ or are no numbers, so nothing "
        "was proven of the cache there"
        for name, row in rows
        if not row.get("steady", True)
    ]
    said += [f"{name}: {row['ratio']:.1f} x mlx-lm's loop" for name, row in rows if "ratio" in row]
    return said


def _table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """One table for each run of rows with the same columns."""
    lines: list[str] = []
    shown: list[str] = []
    for name, row in rows:
        if list(row) != shown:
            shown = list(row)
            lines += [""] * bool(lines)
            lines += [f"| | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
        lines.append(f"| {name} | {' | '.join(_told(row[column]) for column in shown)} |")
    return lines


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
