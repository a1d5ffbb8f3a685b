"""The model card of an exported subnetwork: what it is, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paretoprune.experiments.latency import Latency
from paretoprune.experiments.units import format_count, format_percent
from paretoprune.search import Record
from paretoprune.surgery import Cost
from paretoprune.surgery.serialization import is_trusted


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one network.

    Attributes:
        cost: MACs and params.
        thop_macs: MACs as thop counts them; None if it cannot.
        file_bytes: Size of its weights as safetensors.
        search: `loss` and `accuracy` on the search split.
        test: The same on the test split; None where there is none.
        latency: Of one forward pass.
    """

    cost: Cost
    thop_macs: int | None
    file_bytes: int
    search: dict[str, float]
    test: dict[str, float] | None
    latency: Latency

    def to_json(self) -> dict[str, object]:
        """Returns the numbers as plain values, for JSON."""
        return {
            "macs": self.cost.macs,
            "params": self.cost.params,
            "thop_macs": self.thop_macs,
            "file_bytes": self.file_bytes,
            "search": self.search,
            "test": self.test,
            "latency_ms": round(self.latency.milliseconds, 3),
            "latency_spread_ms": round(self.latency.spread, 3),
            "latency_repeats": self.latency.repeats,
        }


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says apart from the measurements.

    Attributes:
        name: Name of the problem.
        run: Name of the run; None if the search had none.
        record: The exported trial.
        conditions: What the latency holds for.
        batch: Examples per forward pass of the latency.
        libraries: Library versions, by name.
        reference: Where the dense network can be built; None if that is unknown.
    """

    name: str
    run: str | None
    record: Record
    conditions: str
    batch: int
    libraries: dict[str, str]
    reference: str | None


def model_card(facts: CardFacts, dense: Measured, small: Measured) -> str:
    """Returns the card in Markdown."""
    share = small.cost.macs / dense.cost.macs
    sections = [
        f"# {facts.name}, pruned to {format_percent(share)} of its MACs",
        f"A structurally pruned version of `{facts.name}`: whole channels"
        + (" and whole residual blocks" if _removed(facts.record) else "")
        + " were removed, so it is a smaller ordinary network that needs no special runtime. "
        "MACs are multiply-accumulates of one forward pass of one example, the papers' “FLOPs”.",
        _numbers(dense, small),
        _footnotes(facts, dense, small),
        "## Load it\n" + _loading(facts.reference),
        "## How it was obtained\n" + _origin(facts),
        "## Files\n"
        "- `model.safetensors`: the weights; nothing is unpickled.\n"
        "- `plan.json`: architecture, plan, metrics and checksum.\n"
        "- `README.md`: this card.",
    ]
    return "\n\n".join(sections) + "\n"


def _removed(record: Record) -> tuple[str, ...]:
    return record.plan.removed if record.plan is not None else ()


def _numbers(dense: Measured, small: Measured) -> str:
    rows = [
        ("MACs", *_counts(dense.cost.macs, small.cost.macs)),
        ("params", *_counts(dense.cost.params, small.cost.params)),
        ("file size", *_bytes(dense.file_bytes, small.file_bytes)),
        *_qualities("search split", dense.search, small.search),
    ]
    if dense.test is not None and small.test is not None:
        rows += _qualities("test split", dense.test, small.test)
    ratio = small.latency.milliseconds / dense.latency.milliseconds
    latency = (str(dense.latency), str(small.latency), format_percent(ratio))
    rows.append(("latency", *latency))
    head = ["| | dense | pruned | pruned / dense |", "|---|---:|---:|---:|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def _counts(dense: int, small: int) -> tuple[str, str, str]:
    return format_count(dense), format_count(small), format_percent(small / dense)


def _bytes(dense: int, small: int) -> tuple[str, str, str]:
    return f"{dense / 1e6:.2f} MB", f"{small / 1e6:.2f} MB", format_percent(small / dense)


def _qualities(
    split: str, dense: dict[str, float], small: dict[str, float]
) -> Sequence[tuple[str, str, str, str]]:
    rows = []
    if "accuracy" in dense:
        change = 100 * (small["accuracy"] - dense["accuracy"])
        values = (format_percent(m["accuracy"], 2) for m in (dense, small))
        rows.append((f"accuracy, {split}", *values, f"{change:+.2f} points"))
    rows.append((f"loss, {split}", f"{dense['loss']:.4f}", f"{small['loss']:.4f}", ""))
    return [(name, a, b, c) for name, a, b, c in rows]


def _footnotes(facts: CardFacts, dense: Measured, small: Measured) -> str:
    lines = [
        "The search split is training data that was held out of calibration; the trained network "
        "may have seen it. "
        + ("The test split was read once, for this card." if small.test else "No test split."),
        f"Latency: median ± half the interquartile range of {small.latency.repeats} forward "
        f"passes after warm-up, in turns with the dense network; batch {facts.batch}, "
        f"{facts.conditions}.",
    ]
    counted = [m.thop_macs for m in (dense, small)]
    if counted[0] is not None and counted[1] is not None:
        equal = counted == [dense.cost.macs, small.cost.macs]
        verdict = (
            "equal to the counts above"
            if equal
            else "which knows no attention and no functional calls"
        )
        lines.append(
            f"Counted independently by thop: {counted[0]:,} MACs dense and {counted[1]:,} pruned, "
            f"{verdict}."
        )
    return "\n\n".join(lines)


def _loading(reference: str | None) -> str:
    """Returns how to load; architectures outside of known libraries have to be named."""
    dense, about = "", ""
    if reference is None:
        dense = ", make_dense_model"
        about = "`make_dense_model` is a function that builds the dense architecture. "
    elif not is_trusted(reference):
        dense = f', "{reference}"'
        about = "The second argument says whose code builds the architecture. "
    return (
        "```python\n"
        "from paretoprune.surgery import load\n\n"
        f'model = load("PATH/OF/THIS/FOLDER"{dense})  # an nn.Module in eval mode\n'
        "outputs = model(inputs)\n"
        "```\n"
        f"{about}torch and safetensors are all that loading needs beside `paretoprune`."
    )


def _origin(facts: CardFacts) -> str:
    record = facts.record
    candidate = record.candidate
    removed = ", ".join(_removed(record)) or "none"
    run = f" of run `{facts.run}`" if facts.run else ""
    origin = "a one-shot baseline" if record.origin == "seed" else "found by the search"
    versions = ", ".join(f"{name} {number}" for name, number in facts.libraries.items())
    return (
        f"Trial {record.number}{run}, {origin}: units ranked by `{candidate.criterion}`, "
        f"{candidate.allocation} allocation, residual blocks removed: {removed}. The weights were "
        f"then reconstructed by least squares on calibration data, without training.\n\n"
        f"Versions: {versions}."
    )


def verdict(directory: Path, dense: Measured, small: Measured) -> str:
    """Returns what was verified, in a few lines."""
    lines = [
        f"{directory}: reloaded, and its outputs equal those of the network in memory",
        f"MACs     {small.cost.macs:,} of {dense.cost.macs:,} "
        f"({format_percent(small.cost.macs / dense.cost.macs)})",
        f"params   {small.cost.params:,} of {dense.cost.params:,} "
        f"({format_percent(small.cost.params / dense.cost.params)})",
    ]
    for split, before, after in (
        ("search split", dense.search, small.search),
        ("test split", dense.test, small.test),
    ):
        if before is not None and after is not None and "accuracy" in after:
            lines.append(
                f"accuracy {format_percent(after['accuracy'], 2)} on the {split} "
                f"(dense {format_percent(before['accuracy'], 2)})"
            )
    lines.append(f"latency  {small.latency} (dense {dense.latency})")
    return "\n".join(lines)


def weights_bytes(directory: Path) -> int:
    """Returns the size of the weights of an export."""
    return (directory / "model.safetensors").stat().st_size
