"""Report measurements in tables and words. A table is data, and is printed plain or as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from .evidence import Evidence, Record, Timing
from .roofs import of_the_roof

# Columns of words, which Markdown aligns to the left.
WORDS = ("op", "row", "precision", "direction", "provider", "figure", "limiter", "target", "teacher", "part")
SAME = 0.05  # two speeds that are nearer than this are called equal


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def plain(self) -> str:
        return "\n".join(line.rstrip() for line in [*aligned([self.header, *self.rows], "  "), *self.notes])

    def markdown(self) -> str:
        rule = ["---" if name in WORDS else "---:" for name in self.header]
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.header, rule, *self.rows])


def aligned(rows: list[list[str]], gap: str = " ") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [gap.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


# --- numbers ----------------------------------------------------------------------------------------------------------


def time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{digits(seconds / unit)} {name}"
    return f"{digits(seconds / 1e-6)} us"


def digits(value: float) -> str:
    """Print three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    """Print a ratio of speeds."""
    return "-" if ratio is None else f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.{1 if ratio >= 1.095 else 2}f}x"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def roof(record: Record, timing: Timing, evidence: Evidence) -> str:
    """Print the share of the nearer roof. A call that is faster than memory ran in a cache, and has no roof."""
    seconds = record.seconds(timing)
    if seconds is None or timing.role == "part" or "copy" not in evidence.roofs:
        return "-"
    share, name = of_the_roof(seconds, record.bytes, record.flops, record.precision, evidence.roofs)
    return "in cache" if share > 1 and name == "copy" else f"{percent(share)} {name}"


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(record: Record, timing: Timing, evidence: Evidence) -> dict[str, str]:
    """Return a provider's line, by the names of its columns. On a GPU `time` is cold."""
    seconds = record.seconds(timing)
    timed = seconds is not None and timing.role != "part"
    line = {"provider": timing.name, "time": time(seconds)}
    line["+-"] = percent(timing.spread(record.headline)) if seconds else "-"
    if record.kind == "cuda":
        line |= {name: time(timing.figure(name)) for name in ("graph", "host")}
    line["vs eager"] = times(record.ratio(timing, record.of("eager"))) if timed else "-"
    amount, unit = (record.bytes / 1e9, "GB/s") if record.images is None else (record.images, "images/s")
    line[unit] = digits(amount / seconds) if timed and seconds else "-"
    line["roof"] = roof(record, timing, evidence)
    if record.kind == "cuda":
        line["peak"] = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f} MiB"
    return line | {"error": f"{max(timing.errors):.0e}" if timing.errors else "-"}


def of_record(record: Record, evidence: Evidence) -> Table:
    lines = [cells(record, t, evidence) for t in record.timings]
    return Table(list(lines[0]), [list(line.values()) for line in lines], notes(record))


def notes(record: Record) -> list[str]:
    found = [f"{t.name}: {t.why}" for t in record.timings if t.why]
    whole = record.of("ours") or record.of("eager")
    parts = [t for t in record.timings if t.role == "part" and t.rounds]
    if parts and whole is not None:
        shares = ((t.name, (record.seconds(t) or 0) / (record.seconds(whole) or 1)) for t in parts)
        found.append(f"of {whole.name}: " + ", ".join(f"{name} {percent(share)}" for name, share in shares))
    return found


def of_op(op: str, evidence: Evidence) -> Table:
    """Return a table of every provider on every row of an op."""
    records = [r for r in evidence.records if r.op == op]
    found = [(r, of_record(r, evidence)) for r in records]
    return Table(
        ["row", "precision", "direction", *found[0][1].header],
        [[r.row, r.precision, r.direction, *line] for r, table in found for line in table.rows],
        [f"{r.row}, {r.direction}: {note}" for r, table in found for note in table.notes],
    )


def summary(evidence: Evidence) -> Table:
    """Return a line for each op, of its most telling row: ours beside eager and torch.compile."""
    header = ["op", "row", "precision", "direction", "eager", "torch.compile", "fused_dino", "vs eager", "vs compile",
              "roof"]  # fmt: skip
    return Table(header, [line(telling(op, evidence), evidence) for op in ops(evidence)])


def line(record: Record, evidence: Evidence) -> list[str]:
    eager, compile, ours = (record.of(role) for role in ("eager", "compile", "ours"))
    return [
        record.op, record.row, record.precision, record.direction,
        *(time(record.seconds(x)) for x in (eager, compile, ours)),
        times(record.ratio(ours, eager)), times(record.ratio(ours, compile)),
        roof(record, ours, evidence) if ours else "-",
    ]  # fmt: skip


def ops(evidence: Evidence) -> list[str]:
    return list(dict.fromkeys(record.op for record in evidence.records))


def telling(op: str, evidence: Evidence) -> Record:
    """Return the last quick record of an op, else its last: a row's directions are measured in order."""
    records = [r for r in evidence.records if r.op == op]
    return ([r for r in records if r.quick] or records)[-1]


# --- words ------------------------------------------------------------------------------------------------------------


def report(evidence: Evidence, planned: int) -> str:
    """Say everything that was measured, and end with one sentence for each op."""
    parts = [heading(evidence), *([roofs(evidence)] if evidence.roofs else [])]
    for record in evidence.records:
        title = f"\n{record.op} {record.row} ({record.precision}), {record.direction}"
        parts += [title, of_record(record, evidence).plain()]
    parts.append("")
    if len(evidence.records) < planned:
        parts.append(f"Measured {len(evidence.records)} of {planned}: the run was ended early.")
    parts += remarks(evidence)
    return "\n".join([*parts, *(sentence(op, evidence) for op in ops(evidence))])


def remarks(evidence: Evidence) -> list[str]:
    """Return what a reader of the times has to know."""
    found = []
    load, cores = evidence.device.get("load") or 0.0, evidence.device.get("cores") or 1
    if load >= cores / 4:
        found.append(f"The machine was busy when the run began: a load of {load:.1f} on {cores} cores. Expect noise.")
    if apart := evidence.noise():
        found.append(
            f"Self-check: eager, timed twice under two names on {len(apart)} rows, differs from itself by "
            f"{percent(median(apart))} in the median and by {percent(max(apart))} at most. Less than that is noise."
        )
    if slow := slow_hosts(evidence):
        found.append(slow)
    if evidence.kind == "cpu" and evidence.records:
        found.append("These are a CPU's times: ratios inside this run count, and say nothing of a GPU.")
    return found


def slow_hosts(evidence: Evidence) -> str | None:
    """Name the rows whose host time on a GPU is above eager's, or return None."""
    found = []
    for record in evidence.records if evidence.kind == "cuda" else ():
        ours, eager = (t.figure("host") if t else None for t in (record.of("ours"), record.of("eager")))
        if ours and eager and ours > eager:
            found.append(f"{record.op} {record.row}, {record.direction} ({time(ours)} > {time(eager)})")
    return f"Our host time is above eager's: {'; '.join(found)}." if found else None


def sentence(op: str, evidence: Evidence) -> str:
    """Return a sentence on an op's most telling row."""
    record = telling(op, evidence)
    return f"{op}: {claim(record, evidence)} ({record.row}, {record.direction}, on this {device(evidence)})"


def claim(record: Record, evidence: Evidence) -> str:
    ours = record.of("ours")
    if ours is None:
        why = next((f": {t.why}" for t in record.timings if t.role == "ours" and t.why), "")
        return f"nothing of ours was timed{why}"
    rivals = (("eager", "eager"), ("compile", "torch.compile"))
    parts = [speed(record.ratio(ours, record.of(role)), name) for role, name in rivals]
    share = roof(record, ours, evidence)
    if share.endswith(("copy", "matrix")):
        parts.append(f"{share.replace(' ', ' of the ')} roof")
    return ", ".join(parts)


def speed(ratio: float | None, rival: str) -> str:
    if ratio is None:
        return f"{rival} could not run"
    if abs(ratio - 1) < SAME:
        return f"as fast as {rival}"
    return f"{times(ratio)} faster than {rival}" if ratio > 1 else f"{times(ratio)} the speed of {rival}"


def device(evidence: Evidence) -> str:
    return "CPU" if evidence.kind == "cpu" else "GPU"


def heading(evidence: Evidence) -> str:
    """Name the machine and the software in a line."""
    d, v = evidence.device, evidence.versions
    driver = d.get("found", {}).get("driver_version", "unknown")
    what = f"{d['threads']} of {d['cores']} cores" if evidence.kind == "cpu" else f"driver {driver}"
    code = f", commit {evidence.commit}" if evidence.commit else ""
    return f"{d['name']} ({what}), torch {v['torch']}, {evidence.started[:10]}{code}"


def roofs(evidence: Evidence) -> str:
    parts = [f"copy {evidence.roofs['copy'] / 1e9:.0f} GB/s (read and written)"] if "copy" in evidence.roofs else []
    parts += [f"matrix product {name} {digits(value / 1e12)} TFLOP/s" for name, value in evidence.roofs.items()
              if name != "copy"]  # fmt: skip
    return "Roofs, measured in the same run: " + ", ".join(parts) + "."
