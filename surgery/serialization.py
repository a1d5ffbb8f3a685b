"""save and load: an export is weights and a plan, and reloads without unpickling anything."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretoprune.surgery.attention import PrunedMultiheadAttention, forget_dense_widths
from paretoprune.surgery.attributes import (
    has_known_sizes,
    remember_weights,
    set_attribute,
    size_attributes,
)
from paretoprune.surgery.errors import UnsupportedModel
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.prune import replace_module
from paretoprune.surgery.recorded import CONSTANT, Recorded, Recording
from paretoprune.surgery.skip import Skip

SCHEMA = 1
"""Version of the form of plan.json."""
WEIGHTS, PLAN = "model.safetensors", "plan.json"
_TRUSTED = re.compile(r"(torchvision|timm|paretoprune\.experiments\.models):[\w.]+")


def is_trusted(reference: object) -> bool:
    """Returns whether `load` builds the architecture of a reference without being told to."""
    return isinstance(reference, str) and _TRUSTED.fullmatch(reference) is not None


def save(
    directory: str | Path,
    small: nn.Module,
    plan: PruningPlan,
    *,
    reference: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and plan.json.

    Args:
        directory: Created if missing.
        small: The pruned network, as pruned or fine-tuned since.
        plan: The plan that leads to it from the dense network.
        reference: Where the dense network can be built: `torchvision:NAME`, `timm:NAME` or
            `package.module:function`.
        arguments: Keyword arguments of `reference`; plain JSON values.
        example_inputs: Recorded as shapes and dtypes.
        metrics: Measured numbers to keep beside the plan; plain JSON values.

    Raises:
        ValueError: If arguments or metrics are no plain JSON values; nothing is written then.
    """
    try:
        json.dumps([dict(arguments or {}), dict(metrics or {})])
    except TypeError as error:
        raise ValueError(f"arguments and metrics are plain JSON values, but {error}.") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = _unique_state(small)
    save_file(state, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes a file for its owner alone
    layers = _sizes(small)
    described = {
        "schema": SCHEMA,
        "reference": reference,
        "arguments": dict(arguments or {}),
        "plan": plan.to_json(),
        "layers": layers,
        "recorded": {
            name: module.recording.to_json()
            for name, module in small.named_modules()
            if isinstance(module, Recorded)
        },
        "inputs": _describe(example_inputs),
        "metrics": dict(metrics or {}),
        "versions": {"torch": torch.__version__},
        "sha256": _sha256(folder / WEIGHTS),
    }
    (folder / PLAN).write_text(json.dumps(described, indent=2) + "\n")


def load(
    directory: str | Path,
    dense: Callable[[], nn.Module] | str | None = None,
) -> nn.Module:
    """Returns the exported network, in eval mode; nothing is traced and nothing unpickled.

    Args:
        directory: What `save` wrote.
        dense: A function that builds the dense network (its weights do not matter), or a
            reference to one as for `save`; None uses the recorded reference if it names a network
            of torchvision, timm or paretoprune. Other code never runs unless named here.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If files are tampered with or do not fit the dense network.
        UnsupportedModel: If the dense network cannot be built.
    """
    folder = Path(directory)
    described = read_plan(folder)
    if _sha256(folder / WEIGHTS) != described["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {PLAN} was written for.")
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file ({error}).") from error
    model = _dense(dense, described)
    try:
        _shrink(model, described, state)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: {error}; give the function that "
            f"builds the network it was exported from."
        ) from error
    return model.eval()


def read_plan(directory: str | Path) -> dict[str, Any]:
    """Returns what plan.json says, checked for its form.

    Raises:
        FileNotFoundError: If a file of the export is missing.
        ValueError: If it is no plan, or of a newer schema.
    """
    folder = Path(directory)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no export: it has no {name}.")
    try:
        described: dict[str, Any] = json.loads((folder / PLAN).read_text())
        schema = described["schema"]
        PruningPlan.from_json(described["plan"])
        missing = {"sha256", "layers", "recorded", "reference", "arguments"} - set(described)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / PLAN} is no plan ({error}).") from error
    if missing or schema != SCHEMA:
        raise ValueError(
            f"{folder / PLAN} has schema {schema} and this version reads schema {SCHEMA}."
            if schema != SCHEMA
            else f"{folder / PLAN} lacks {', '.join(sorted(missing))}."
        )
    return described


def _sizes(model: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Returns the attributes that surgery may rewrite, by module that has any."""
    found = {name: size_attributes(module) for name, module in model.named_modules()}
    return {name: sizes for name, sizes in found.items() if sizes}


def _unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict with tied tensors once, contiguous, on the CPU."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state


def _dense(dense: Callable[[], nn.Module] | str | None, described: dict[str, Any]) -> nn.Module:
    if dense is None:
        reference = described["reference"]
        if not is_trusted(reference):
            raise ValueError(
                f"the export names the architecture {reference!r}, which is not imported unless "
                f"you say so: pass the function that builds it, or this reference."
            )
        _check_arguments(described["arguments"])
        dense = reference
    if isinstance(dense, nn.Module):
        raise ValueError(
            f"a function that builds the dense network is needed, but got {type(dense).__name__} "
            f"itself; a network that can be changed is given by lambda: network."
        )
    if isinstance(dense, str):
        return build(dense, described["arguments"])
    return _module(dense(), dense)


def _check_arguments(arguments: Any) -> None:
    """Refuses what could make a library fetch or unpickle weights: paths, settings, names."""
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments are given by name, but the export has {arguments!r}.")
    for name, value in arguments.items():
        if name == "pretrained" or not isinstance(value, (bool, int, float, NoneType)):
            raise ValueError(
                f"the export passes {name}={value!r} to its architecture, and only numbers are "
                f"passed on unless you say so: pass the reference or the function that builds it."
            )


def _module(network: Any, source: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise UnsupportedModel(
            f"{source!r} returns {type(network).__name__}, but an nn.Module is needed."
        )
    return network


def build(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Returns the network that a reference names.

    Args:
        reference: `torchvision:NAME`, `timm:NAME` or `package.module:function`.
        arguments: Keyword arguments.

    Raises:
        UnsupportedModel: If there is no such network.
    """
    source, _, name = reference.partition(":")
    try:
        if source == "torchvision":
            models = importlib.import_module("torchvision.models")
            network = models.get_model(name, weights=None, **arguments)
        elif source == "timm":
            network = importlib.import_module("timm").create_model(name, **arguments)
        else:
            network = getattr(importlib.import_module(source), name)(**arguments)
    except (ImportError, AttributeError, ValueError, RuntimeError, TypeError) as error:
        raise UnsupportedModel(f"cannot build {reference!r}: {error}.") from error
    return _module(network, reference)


def _shrink(model: nn.Module, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Gives the dense network the export's tensors and layer attributes, in place."""
    for name in described["plan"]["removed"]:
        replace_module(model, name, Skip())
    for name, recording in described["recorded"].items():
        prefix = f"{name}.{CONSTANT}"
        constants = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        runner = Recorded(model.get_submodule(name), Recording.from_json(recording, constants))
        replace_module(model, name, runner)
    _set_sizes(model, described["layers"])
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    odd = sorted(set(tensors) ^ set(state))
    if odd:
        raise LookupError(f"tensor {odd[0]!r} is in one of them only")
    for name, tensor in tensors.items():
        if tensor.ndim != state[name].ndim or tensor.dtype != state[name].dtype:
            raise LookupError(f"tensor {name!r} has another rank or dtype")
        _replace(model, tensor, state[name])
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            PrunedMultiheadAttention.convert_unless_whole(module)
        elif isinstance(module, nn.RNNBase):
            remember_weights(module)
    forget_dense_widths(model.modules())


def _set_sizes(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets the sizes that an export describes, in place.

    An integer that a module of the user's has on one side only is one that its code sets when it
    runs: it is no size of the architecture and stays as it is.
    """
    layers = _sizes(model)
    for name in sorted({*layers, *described}):
        module = model.get_submodule(name)
        found, wanted = layers.get(name, {}), described.get(name, {})
        if has_known_sizes(module) and set(found) != set(wanted):
            if not found or not wanted:
                raise LookupError(f"layer {name!r} is in one of them only")
            raise LookupError(
                f"layer {name!r} has the sizes {', '.join(found)} and not "
                f"{', '.join(sorted(wanted))}"
            )
        for key in found.keys() & wanted.keys():
            if not _is_size(wanted[key]):
                raise LookupError(f"{key} of layer {name!r} is no size: {wanted[key]!r}")
            set_attribute(module, key, wanted[key])


def _is_size(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(item) is int for item in values)


def _replace(model: nn.Module, old: Tensor, new: Tensor) -> None:
    value = (
        nn.Parameter(new, requires_grad=old.requires_grad)
        if isinstance(old, nn.Parameter)
        else new
    )
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = value  # type: ignore[assignment]


def _describe(example_inputs: Any) -> Any:
    if isinstance(example_inputs, Tensor):
        return {"shape": list(example_inputs.shape), "dtype": str(example_inputs.dtype)}
    if isinstance(example_inputs, dict):
        return {key: _describe(value) for key, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return [_describe(value) for value in example_inputs]
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
