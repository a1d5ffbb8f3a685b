"""The model card of an exported subnetwork: what it is, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paretoprune.experiments.exporting.formats import Written
from paretoprune.experiments.measuring.reports import Report
from paretoprune.experiments.units import format_count, format_percent
from paretoprune.search import Record
from paretoprune.search.latency import Latency
from paretoprune.search.objectives import own_metrics
from paretoprune.search.record import LAYER, NEURONS
from paretoprune.surgery import Cost
from paretoprune.surgery.serialization import is_trusted

_BLOCK = 8
"""Channels that common CPU and GPU kernels compute together at least."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one network.

    Attributes:
        cost: MACs and params.
        thop_macs: MACs as thop counts them; None if it cannot.
        file_bytes: Size of its weights as safetensors.
        widths: Number of outputs of every convolution and linear layer.
        search: `loss` and `accuracy` on the search split.
        test: The same on the test split, and the number of `examples`; None where there is none.
        latency: Of one forward pass.
    """

    cost: Cost
    thop_macs: int | None
    file_bytes: int
    widths: tuple[int, ...]
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


def model_card(
    facts: CardFacts,
    dense: Measured,
    small: Measured,
    written: Sequence[Written] = (),
    reports: Sequence[Report] = (),
) -> str:
    """Returns the card in Markdown."""
    share = small.cost.macs / dense.cost.macs
    sections = [
        f"# {facts.name}, pruned to {format_percent(share)} of its MACs",
        f"A structurally pruned version of `{facts.name}`: whole channels"
        + (" and whole residual blocks" if facts.record.removed else "")
        + " were removed, so it is a smaller ordinary network that needs no special runtime. "
        "MACs are multiply-accumulates of one forward pass of one example, the papers' “FLOPs”.",
        _numbers(dense, small),
        _footnotes(facts, dense, small, written, again=any(one.tested for one in reports)),
        *_formats(written),
        *(report.markdown for report in reports),
        "## Load it\n" + "\n\n".join([_loading(facts.reference), *_running(written)]),
        "## How it was obtained\n" + _origin(facts),
        "## Files\n"
        "- `model.safetensors`: the weights; nothing is unpickled.\n"
        "- `plan.json`: architecture, plan, metrics and checksum.\n"
        + "".join(f"- `{one.file}`: the whole network, {one.runtime}.\n" for one in written)
        + "- `README.md`: this card.",
    ]
    return "\n\n".join(sections) + "\n"


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
    rows += [
        (f"{name}, {split}", f"{value:.4g}", f"{small[name]:.4g}", "")
        for name, value in own_metrics(dense).items()
    ]
    return [(name, a, b, c) for name, a, b, c in rows]


def _footnotes(
    facts: CardFacts, dense: Measured, small: Measured, written: Sequence[Written], *, again: bool
) -> str:
    lines = [
        "The search split is training data that was held out of calibration; the trained network "
        "may have seen it. " + _tested(small.test, again=again),
        f"Latency: median ± half the interquartile range of {small.latency.repeats} forward "
        f"passes after warm-up, in turns with the dense network; batch {facts.batch}, "
        f"{facts.conditions}.",
        *([slow] if (slow := not_faster(dense, small, written)) else []),
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


def _tested(test: dict[str, float] | None, *, again: bool) -> str:
    if test is None:
        return "No test split."
    beside = " and the robustness below" if again else ""
    return (
        f"The test split, {test['examples']:,} examples that the search chose nothing by, was "
        f"read for this card: top-1 of both networks as written, in eval mode{beside}."
    )


def not_faster(dense: Measured, small: Measured, written: Sequence[Written]) -> str | None:
    """Returns where pruning saves no time and what may help; None if it does everywhere."""
    pairs = {"torch": (dense.latency, small.latency)} | {one.name: one.latency for one in written}
    slow = [name for name, (before, after) in pairs.items() if not after.improves_on(before)]
    if not slow:
        return None
    odd = sum(width % _BLOCK != 0 for width in small.widths)
    return (
        f"Not faster than the dense network, beyond the spread, in: {', '.join(slow)}. Kernels "
        f"compute channels in blocks, and {odd} of the {len(small.widths)} layers have no "
        f"multiple of {_BLOCK}; in small networks and batches, time per layer decides. Removed "
        f"blocks and fewer FLOPs (--max-flops) save time where single channels do not."
    )


def _formats(written: Sequence[Written]) -> list[str]:
    """Returns the section about the files beside the weights."""
    if not written:
        return []
    rows = ["## Other formats", ""]
    rows += ["| file | | dense | pruned | pruned / dense |", "|---|---|---:|---:|---:|"]
    for one in written:
        size = " | ".join(_bytes(*one.file_bytes))
        before, after = one.latency
        ratio = format_percent(after.milliseconds / before.milliseconds)
        rows.append(f"| `{one.file}` | file size | {size} |")
        rows.append(f"| | latency | {before} | {after} | {ratio} |")
    compared = [
        f"`{one.file}` ({one.runtime}): on {one.examples} examples of the search split, and on "
        f"one alone, its outputs {_equal(one)} the network's."
        for one in written
    ]
    about = "Written with free batch size, dense and pruned alike, and timed as above."
    return ["\n".join(rows), about, *compared]


def _equal(one: Written) -> str:
    if one.difference == 0:
        return "equal"
    return f"differ by at most {one.difference:.1e} from"


def _running(written: Sequence[Written]) -> list[str]:
    """Returns how to run the files beside the weights."""
    code = {
        "onnx": "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        "name = session.get_inputs()[0].name\n"
        "(outputs,) = session.run(None, {name: images.numpy()})  # float32, any batch size",
        "pt2": "import torch\n\n"
        'model = torch.export.load("model.pt2").module()\n'
        "outputs = model(images)",
    }
    return [f"```python\n{code[one.name]}\n```" for one in written]


def load_call(directory: str | Path, reference: str | None) -> str:
    """Returns the call of `surgery.load`; architectures outside of known libraries are named."""
    dense = "make_dense_model" if reference is None else f'"{reference}"'
    return f'load("{directory}")' if is_trusted(reference) else f'load("{directory}", {dense})'


def _loading(reference: str | None) -> str:
    """Returns how to load."""
    about = ""
    if reference is None:
        about = "`make_dense_model` is a function that builds the dense architecture. "
    elif not is_trusted(reference):
        about = "The second argument says whose code builds the architecture. "
    call = load_call("PATH/OF/THIS/FOLDER", reference)
    return (
        "```python\n"
        "from paretoprune.surgery import load\n\n"
        f"model = {call}  # an nn.Module in eval mode\n"
        "outputs = model(inputs)\n"
        "```\n"
        f"{about}torch and safetensors are all that loading needs beside `paretoprune`."
    )


def _origin(facts: CardFacts) -> str:
    record = facts.record
    candidate = record.candidate
    removed = ", ".join(record.removed) or "none"
    run = f" of run `{facts.run}`" if facts.run else ""
    origins = {
        "seed": "a one-shot baseline",
        LAYER: "a step of the strategy `everything` that removed a layer",
        NEURONS: "a step of the strategy `everything` that removed neurons",
    }
    origin = origins.get(record.origin, "found by the search")
    trained = "without training"
    if record.origin in (LAYER, NEURONS):
        trained = "and trained where the search was given epochs for it"
    if record.finetuning_taken:
        trained = f"then fine-tuned for {record.finetuned_metrics['epochs']:.0f} epochs"
    elif record.finetuned_metrics:
        trained += f"; {_not_taken(record)}"
    versions = ", ".join(f"{name} {number}" for name, number in facts.libraries.items())
    return (
        f"Trial {record.number}{run}, {origin}: units ranked by `{candidate.criterion}`, "
        f"{candidate.allocation} allocation, residual blocks removed: {removed}. The weights were "
        f"then reconstructed by least squares on calibration data, {trained}.\n\n"
        f"Versions: {versions}."
    )


def _not_taken(record: Record) -> str:
    """Returns why the fine-tuned network of a record is not the one that is exported."""
    before, after = record.handed_out, record.finetuned_metrics
    changes = [
        f"{name} {before[name]:.4f} to {after[name]:.4f}"
        for name in ("loss", "accuracy")
        if name in before and name in after
    ]
    return (
        f"fine-tuning for {after['epochs']:.0f} epochs took it from {' and from '.join(changes)} "
        f"on the search split, which is worse, so its weights were not taken"
    )


def verdict(
    directory: Path, dense: Measured, small: Measured, written: Sequence[Written] = ()
) -> str:
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
        lines += [
            f"{name:<8} {value:.4g} on the {split} (dense {(before or {})[name]:.4g})"
            for name, value in own_metrics(after or {}).items()
        ]
    lines.append(f"latency  {small.latency} (dense {dense.latency})")
    lines += [
        f"{one.name:<8} {one.latency[1]} (dense {one.latency[0]}); {one.runtime}; outputs "
        f"{_equal(one)} the network's on {one.examples} real inputs"
        for one in written
    ]
    slow = not_faster(dense, small, written)
    if slow:
        lines.append(slow)
    return "\n".join(lines)


def weights_bytes(directory: Path) -> int:
    """Returns the size of the weights of an export."""
    return (directory / "model.safetensors").stat().st_size
