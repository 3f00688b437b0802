"""What was measured, in words and columns: a table is data, and is printed plain, in colours or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .evidence import Evidence, Record, Timing
from .measure import middle
from .roofs import of_the_roof
from .shapes import BACKWARD

WORDS = (
    "op",
    "row",
    "precision",
    "direction",
    "provider",
    "figure",
    "limiter",
    "target",
)  # columns that are read from the left
SAME = 0.05  # two speeds that are nearer than this are called equal


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def plain(self) -> str:
        lines = [self.title, *aligned([self.header, *self.rows]), *self.notes]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        rule = ["---" if name in WORDS else "---:" for name in self.header]
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.header, rule, *self.rows])


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


# --- numbers ----------------------------------------------------------------------------------------------------------


def time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{digits(seconds / unit)} {name}"
    return f"{digits(seconds / 1e-6)} us"


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(ratio: float | None) -> str:
    """A ratio of speeds."""
    return "-" if ratio is None else f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.{1 if ratio >= 1.095 else 2}f}x"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def rate(per_second: float) -> str:
    scale, name = (1e12, "T") if per_second >= 1e12 else (1e9, "G")
    return f"{digits(per_second / scale)} {name}"


def size(bytes: int | None) -> str:
    return "-" if bytes is None else f"{bytes / 2**20:.0f} MiB"


def roof(record: Record, timing: Timing, evidence: Evidence) -> str:
    """The share of the nearer roof. What is faster than memory was in a cache, and has no roof here."""
    seconds = record.seconds(timing)
    if seconds is None or timing.role == "room" or "copy" not in evidence.roofs:
        return "-"
    share, name = of_the_roof(seconds, record.bytes, record.flops, record.precision, evidence.roofs)
    return "in cache" if share > 1 and name == "copy" else f"{percent(share)} {name}"


# --- tables -----------------------------------------------------------------------------------------------------------


def cells(record: Record, timing: Timing, evidence: Evidence) -> dict[str, str]:
    """A provider's line, under the names of its columns; on a GPU `time` is cold, beside the graph's and the host's."""
    seconds = record.seconds(timing)
    timed = seconds is not None and timing.role != "room"
    return {
        "time": time(seconds),
        "+-": percent(timing.spread(record.headline)) if seconds else "-",
        **(
            {} if record.kind == "cpu" else {"graph": time(timing.figure("graph")), "host": time(timing.figure("host"))}
        ),
        "vs eager": times(record.ratio(timing, record.of("eager"))) if timed else "-",
        "GB/s": digits(record.bytes / seconds / 1e9) if timed and seconds else "-",
        "FLOP/s": rate(record.flops / seconds) if timed and seconds else "-",
        "roof": roof(record, timing, evidence),
        **({} if record.kind == "cpu" else {"peak": size(timing.peak_bytes)}),
        "error": f"{max(timing.errors):.0e}" if timing.errors else "-",
    }


NARROW = ("FLOP/s", "GB/s", "peak")  # given up, in this order, where a terminal is too narrow


def of_record(record: Record, evidence: Evidence, width: int = 120) -> Table:
    lines = [{"provider": t.name, **cells(record, t, evidence)} for t in record.timings]
    table = Table("", [], [])
    for dropped in range(len(NARROW) + 1):
        header = [name for name in lines[0] if name not in NARROW[:dropped]]
        table = Table(f"{record.op} {record.row} ({record.precision}), {record.direction}", header,
                      [[line[name] for name in header] for line in lines], notes(record))  # fmt: skip
        if len(aligned([header, *table.rows])[0]) <= width:
            break
    return table


def notes(record: Record) -> list[str]:
    found = [f"{t.name}: {t.why}" for t in record.timings if t.why]
    whole = record.of("ours") or record.of("eager")
    rooms = [t for t in record.timings if t.role == "room" and t.rounds]
    if rooms and whole is not None:
        shares = ((t.name, (record.seconds(t) or 0) / (record.seconds(whole) or 1)) for t in rooms)
        found.append(f"of {whole.name}: " + ", ".join(f"{name} {percent(share)}" for name, share in shares))
    return found


def of_op(op: str, evidences: Iterable[Evidence]) -> Table:
    """Every provider on every row of an op, of one device: ValueError for more, whose times do not compare."""
    evidences = list(evidences)
    same_device(evidences)
    lines = [
        {"row": r.row, "precision": r.precision, "direction": r.direction, "provider": t.name, **cells(r, t, e)}
        for e in evidences
        for r in e.records
        if r.op == op
        for t in r.timings
    ]
    found = {f"{r.row}, {r.direction}: {note}": None for e in evidences for r in e.records if r.op == op
             for note in notes(r)}  # fmt: skip
    return Table(op, list(lines[0]), [list(line.values()) for line in lines], list(found))


def summary(evidences: Iterable[Evidence]) -> Table:
    """A line an op, its most telling row: ours beside eager and torch.compile. Of one device, as of_op."""
    evidences = list(evidences)
    same_device(evidences)
    rows = [line(telling(op, e), e) for e in evidences for op in dict.fromkeys(record.op for record in e.records)]
    header = ["op", "row", "precision", "direction", "eager", "torch.compile", "fused_dino", "vs eager", "vs compile",
              "roof"]  # fmt: skip
    return Table("", header, rows)


def line(record: Record, evidence: Evidence) -> list[str]:
    eager, compile, ours = (record.of(role) for role in ("eager", "compile", "ours"))
    return [
        record.op, record.row, record.precision, record.direction,
        *(time(record.seconds(x)) for x in (eager, compile, ours)),
        times(record.ratio(ours, eager)), times(record.ratio(ours, compile)),
        roof(record, ours, evidence) if ours else "-",
    ]  # fmt: skip


def last_directions(records: list[Record]) -> list[Record]:
    both = {(r.op, r.row, r.precision) for r in records if r.direction == BACKWARD}
    return [r for r in records if r.direction == BACKWARD or (r.op, r.row, r.precision) not in both]


def same_device(evidences: list[Evidence]) -> None:
    devices = {(e.kind, e.device["name"], e.device["threads"] if e.kind == "cpu" else None) for e in evidences}
    if len(devices) != 1:
        raise ValueError(f"one table holds one device's times, got {len(devices)}: {sorted(map(str, devices))}")


# --- words ------------------------------------------------------------------------------------------------------------


def sentence(op: str, evidence: Evidence) -> str:
    """What an op's most telling row says."""
    record = telling(op, evidence)
    return f"{op}: {claim(record, evidence)} ({record.row}, {record.direction}, on this {device(evidence)})"


def telling(op: str, evidence: Evidence) -> Record:
    """The last quick row, else the last."""
    records = last_directions([r for r in evidence.records if r.op == op])
    return ([r for r in records if r.quick] or records)[-1]


def claim(record: Record, evidence: Evidence) -> str:
    ours = record.of("ours")
    if ours is None:
        why = next((f": {t.why}" for t in record.timings if t.role == "ours" and t.why), "")
        return f"nothing of ours was timed{why}"
    parts = [speed(record.ratio(ours, record.of("eager")), "eager")]
    compiled = record.ratio(ours, record.of("compile"))
    parts.append("torch.compile could not run" if compiled is None else speed(compiled, "torch.compile"))
    share = roof(record, ours, evidence)
    if share.endswith(("copy", "matrix")):
        parts.append(f"{share.replace(' ', ' of the ')} roof")
    return ", ".join(parts)


def speed(ratio: float | None, whom: str) -> str:
    if ratio is None:
        return f"{whom} could not run"
    if abs(ratio - 1) < SAME:
        return f"as fast as {whom}"
    return f"{times(ratio)} faster than {whom}" if ratio > 1 else f"{times(ratio)} the speed of {whom}"


def device(evidence: Evidence) -> str:
    return "CPU" if evidence.kind == "cpu" else "GPU"


def noise(evidence: Evidence) -> str | None:
    """What a self-check found; None where there was none."""
    apart = evidence.noise()
    if not apart:
        return None
    return (
        f"Self-check: eager, timed twice under two names on {len(apart)} rows, differs from itself by "
        f"{percent(middle(apart))} in the median and by {percent(max(apart))} at most. Less than that is noise."
    )


def slow_hosts(evidence: Evidence) -> str | None:
    """Where our host time is above eager's, on a GPU: None where it is nowhere."""
    found = []
    for record in evidence.records if evidence.kind == "cuda" else ():
        ours, eager = (t.figure("host") if t else None for t in (record.of("ours"), record.of("eager")))
        if ours and eager and ours > eager:
            found.append(f"{record.op} {record.row}, {record.direction} ({time(ours)} > {time(eager)})")
    return f"Our host time is above eager's: {'; '.join(found)}." if found else None


def busy(evidence: Evidence) -> str | None:
    """A warning, where others had the machine when the run began."""
    load, cores = evidence.device.get("load") or 0.0, evidence.device.get("cores") or 1
    if load < cores / 4:
        return None
    return f"The machine was busy when the run began: a load of {load:.1f} on {cores} cores. Expect noise."


def heading(evidence: Evidence) -> str:
    """The machine and the software, in a line."""
    d, v = evidence.device, evidence.versions
    what = f"{d['threads']} of {d['cores']} cores" if evidence.kind == "cpu" else f"driver {driver(d)}"
    code = f", commit {evidence.commit}" if evidence.commit else ""
    return f"{d['name']} ({what}), torch {v['torch']}, {evidence.started[:10]}{code}"


def driver(device: dict) -> str:
    return device.get("found", {}).get("driver_version", "unknown")


def roofs(evidence: Evidence) -> str:
    parts = [f"copy {evidence.roofs['copy'] / 1e9:.0f} GB/s (read and written)"] if "copy" in evidence.roofs else []
    parts += [f"matrix product {name} {rate(value)}FLOP/s" for name, value in evidence.roofs.items()
              if name != "copy"]  # fmt: skip
    return "Roofs, measured in the same run: " + ", ".join(parts) + "."
