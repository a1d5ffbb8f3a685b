"""Formats that run without this package: ONNX files and `torch.export` programs.

Every file is run on real inputs, in the runtime it is made for, before it counts as written.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paretoprune.experiments.data.sources import first_examples
from paretoprune.experiments.units import names
from paretoprune.search.evaluation import one_line
from paretoprune.search.latency import Latency, one_thread, time_in_turns
from paretoprune.search.metrics import forward
from paretoprune.surgery.inputs import count_rows, has_rows
from paretoprune.surgery.program import as_call

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SAFETENSORS = "safetensors"
"""The format that every export has, because `surgery.load` reads it."""
OPSET = 20
"""ONNX operator set: the one that torch writes without converting."""
_TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest output: other runtimes add numbers in
another order."""

Run = Callable[[Any], Any]
"""Inputs of one batch -> outputs."""


class ExportFailed(RuntimeError):
    """The network cannot be written, or what was written is another network."""


@dataclass(frozen=True)
class Format:
    """How a format is written and run.

    Attributes:
        file: Name of the file.
        packages: What it needs beside the package's own dependencies; the extra of the format's
            name installs them.
        write: Writes a program that was traced with free batch size.
        open: Returns what runs a file, on one thread of the CPU.
        runtime: Returns what wrote and ran it, with versions.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    open: Callable[[Path], Run]
    runtime: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Written:
    """What was measured of one file; pairs are (dense, pruned), both written in this format.

    Attributes:
        name: Name of the format.
        file: Name of the file.
        runtime: What wrote and ran it.
        file_bytes: File sizes.
        latency: Of one forward pass of the example inputs in the format's runtime.
        examples: Real inputs on which its outputs were compared with the network in memory.
        difference: Largest absolute difference among these outputs.
    """

    name: str
    file: str
    runtime: str
    file_bytes: tuple[int, int]
    latency: tuple[Latency, Latency]
    examples: int
    difference: float

    def to_json(self) -> dict[str, object]:
        """Returns the numbers of the pruned network as plain values, for JSON."""
        return {
            "runtime": self.runtime,
            "file_bytes": self.file_bytes[1],
            "latency_ms": round(self.latency[1].milliseconds, 3),
            "examples_compared": self.examples,
            "largest_difference": self.difference,
        }


def parse_formats(text: str) -> tuple[str, ...]:
    """Returns the formats that a comma-separated list adds to safetensors.

    Raises:
        ValueError: If one is unknown, or needs packages that are not installed.
    """
    formats = names(text)
    for name in formats:
        if name != SAFETENSORS and name not in FORMATS:
            known = ", ".join((SAFETENSORS, *FORMATS))
            raise ValueError(f"unknown export format {name!r}; available: {known}.")
    beside = tuple(name for name in formats if name != SAFETENSORS)
    for name in beside:
        missing = [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ValueError(
                f"the format {name} needs {', '.join(missing)}, which this environment lacks; "
                f"install it with: pip install 'paretoprune[{name}]'"
            )
    return beside


def write_format(
    name: str,
    folder: Path,
    dense: nn.Module,
    small: nn.Module,
    batch: Any,
    example_inputs: Any,
    scratch: Path,
) -> Written:
    """Writes the pruned network in a format, compares it on real inputs, and measures it.

    Args:
        name: Name of the format.
        folder: Where the file goes.
        dense: Network that is measured beside it, in the same format and runtime.
        small: The pruned network; both in eval mode on the CPU.
        batch: Real inputs of a batch; compared as they are and with the first one alone, so that
            the batch size is seen to be free.
        example_inputs: Inputs whose latency is measured.
        scratch: Folder for the dense network's file.

    Raises:
        ExportFailed: If the network cannot be written, or the file computes something else.
    """
    form = FORMATS[name]
    files = (scratch / form.file, folder / form.file)
    for network, file in zip((dense, small), files, strict=True):
        try:
            with _silence():
                form.write(_program(network, batch), file)
        except Exception as error:
            raise ExportFailed(
                f"the network cannot be written as {name} with a free batch size: "
                f"{one_line(error)}"
            ) from error
    try:
        with one_thread(), torch.no_grad():
            runs = [form.open(file) for file in files]
            difference = max(
                _difference(small, runs[1], inputs) for inputs in (batch, first_examples(batch, 1))
            )
            pair = time_in_turns([partial(run, example_inputs) for run in runs])
    except ExportFailed as error:
        raise ExportFailed(f"{form.file} {error}") from error
    except Exception as error:
        raise ExportFailed(
            f"{form.file} was written but does not run: {one_line(error)}"
        ) from error
    return Written(
        name,
        form.file,
        form.runtime(),
        (files[0].stat().st_size, files[1].stat().st_size),
        (pair[0], pair[1]),
        count_rows(batch),
        difference,
    )


def _program(model: nn.Module, inputs: Any) -> ExportedProgram:
    """Returns a model as a program that takes any batch size."""
    from torch.export import Dim, ShapesCollection, export

    args, kwargs = as_call(first_examples(inputs, 2))  # a batch of 1 would be taken as fixed
    shapes = ShapesCollection()
    size = Dim("batch")
    for leaf in tree_leaves((args, kwargs)):
        if has_rows(leaf):
            shapes[leaf] = {0: size}
    with torch.no_grad():
        program = export(model, args, kwargs, dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def _difference(model: nn.Module, run: Run, inputs: Any) -> float:
    """Returns the largest absolute difference of outputs.

    Raises:
        ExportFailed: If it is too large, or the outputs have another form.
    """
    expected = [leaf for leaf in tree_leaves(forward(model, inputs)) if isinstance(leaf, Tensor)]
    actual = [leaf for leaf in tree_leaves(run(inputs)) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in actual] != [leaf.shape for leaf in expected]:
        raise ExportFailed("has outputs of other shapes than the network in memory.")
    largest = 0.0
    for ours, theirs in zip(expected, actual, strict=True):
        difference = float((ours - theirs).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(ours.abs().max())):  # nor NaN
            raise ExportFailed(
                f"does not compute what the network in memory does: outputs differ by up to "
                f"{difference:.2g} on real inputs."
            )
        largest = max(largest, difference)
    return largest


def _write_pt2(program: ExportedProgram, file: Path) -> None:
    torch.export.save(program, file)


def _open_pt2(file: Path) -> Run:
    module = torch.export.load(file).module()
    return lambda inputs: forward(module, inputs)


def _write_onnx(program: ExportedProgram, file: Path) -> None:
    args, kwargs = program.example_inputs or ((), {})
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    torch.onnx.export(
        program,
        args,
        file,
        kwargs=kwargs,
        dynamic_shapes=[
            {0: "batch"} if has_rows(leaf) else None for leaf in (*args, *kwargs.values())
        ],
        input_names=["inputs"] if len(leaves) == 1 else None,
        opset_version=OPSET,
        external_data=False,  # one file
        verbose=False,
    )


def _open_onnx(file: Path) -> Run:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(as_call(inputs)) if isinstance(leaf, Tensor)]
        fed = {name: leaf.cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, fed)]

    return run


FORMATS = {
    "onnx": Format(
        "model.onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        _write_onnx,
        _open_onnx,
        lambda: f"opset {OPSET}, onnxruntime {version('onnxruntime')}",
    ),
    "pt2": Format(
        "model.pt2", (), _write_pt2, _open_pt2, lambda: f"torch.export, torch {version('torch')}"
    ),
}
"""What can be written beside safetensors."""


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the remarks of exporters, which are about their own insides, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
