"""References: the strings that name networks and functions, and the weights that fill them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pickle
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.experiments.data.datasets import IMAGENET, Preparation
from paretoprune.search.evaluation import first_line, one_line
from paretoprune.search.weights import EXTRA_STATE

LIBRARIES = ("torchvision", "timm")
"""Prefixes of MODEL references that name a library and not a package."""
_SWITCHES = ("aux_logits", "transform_input", "image_size")


@dataclass(frozen=True, slots=True)
class Network:
    """A network with what it takes to build its architecture again.

    Attributes:
        model: The network, in eval mode.
        reference: `torchvision:NAME`, `timm:NAME` or `package.module:function`.
        arguments: Keyword arguments of the reference.
    """

    model: nn.Module
    reference: str
    arguments: dict[str, Any]


def close_matches(name: str, known: Iterable[str]) -> str:
    """Returns the part of an error message that offers the nearest of the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names[:20])}."


def import_reference(reference: str) -> Callable[..., Any]:
    """Returns the function that `package.module:function` names.

    The current folder is importable, also where the program was started as a console script.

    Raises:
        ValueError: If the reference has another form, or its module, or the function in it,
            is not there, or importing it fails.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name.isidentifier():
        raise ValueError(f"a reference reads package.module:function, but got {reference!r}.")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name!r} of {reference!r} ({error}); run from the folder that "
            f"holds it, or install it."
        ) from error
    except Exception as error:  # a module may do anything as it is imported
        raise ValueError(
            f"cannot import {module_name!r} of {reference!r}: {one_line(error)} ({_place(error)})."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"module {module_name!r} has no function {name!r}; {close_matches(name, functions)}"
        )
    return function  # type: ignore[no-any-return]


def _place(error: Exception) -> str:
    """Returns file:line where an import or a call failed: the last line that is of no library."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    _, *frames = traceback.extract_tb(error.__traceback__)  # the first is ours
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen ")
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def call_reference(reference: str, **available: Any) -> Any:
    """Returns what the function returns, called with those of `available` that it declares.

    Raises:
        ValueError: If the reference names nothing, or the function needs another argument or
            raises; a `ValueError` of its own is passed on as it is.
    """
    function = import_reference(reference)
    arguments = _accepted(reference, function, available)
    try:
        return function(**arguments)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{reference} raised {one_line(error)} ({_place(error)}).") from error


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Returns whether the function declares a keyword argument of that name."""
    return argument in inspect.signature(function).parameters


def required(function: Callable[..., Any]) -> set[str]:
    """Returns the names of the arguments that a function cannot be called without."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _accepted(
    reference: str, function: Callable[..., Any], available: dict[str, Any]
) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    for name in parameters:
        if name in required(function) and name not in available:
            offered = ", ".join(available) or "none"
            raise ValueError(
                f"{reference} needs the argument {name!r}, but only these are given: {offered}."
            )
    return {name: value for name, value in available.items() if name in parameters}


def library_network(reference: str, *, classes: int | None, weights: str | None) -> Network:
    """Builds a network of torchvision or timm.

    Args:
        reference: `torchvision:NAME` or `timm:NAME`.
        classes: Number of classes of the data; None if unknown. Pretrained weights bring
            their own.
        weights: `DEFAULT` or another name that the library gives to pretrained weights; a file
            of weights; None leaves the network untrained.

    Raises:
        ValueError: If the library does not know the name, or the weights do not fit.
    """
    library, _, name = reference.partition(":")
    pretrained, build = (_torchvision if library == "torchvision" else _timm)(name, weights)
    arguments: dict[str, Any] = {}
    if classes is not None and not pretrained:
        arguments["num_classes"] = classes
    try:
        model = build(**arguments).eval()
    except OSError as error:  # URLError is one
        raise ValueError(
            f"the pretrained weights {weights!r} of {reference} cannot be downloaded: {error}."
        ) from error
    if pretrained:  # factories of Inception, GoogLeNet and ViT change these with their weights
        switches = [name for name in _SWITCHES if hasattr(model, name)]
        arguments.update({name: getattr(model, name) for name in switches})
    elif weights is not None:
        load_weights(model, weights)
    return Network(model, reference, arguments)


def _torchvision(name: str, weights: str | None) -> tuple[bool, Callable[..., nn.Module]]:
    """Returns whether `weights` are pretrained ones, and the factory with them."""
    from torchvision import models

    pretrained = _torchvision_weights(name, weights)

    def build(**arguments: Any) -> nn.Module:
        return models.get_model(  # type: ignore[no-any-return]
            name, weights=pretrained, **arguments
        )

    return pretrained is not None, build


def _torchvision_weights(name: str, weights: str | None) -> Any:
    """Returns the pretrained weights that `weights` names; None where it names a file, or none."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"unknown torchvision model {name!r}; {close_matches(name, known)}")
    named = models.get_model_weights(name).__members__  # DEFAULT among them, an alias
    if weights is not None and weights not in named and not Path(weights).exists():
        raise ValueError(
            f"weights {weights!r} are neither a file nor weights of torchvision:{name}, which are "
            f"{', '.join(named)}."
        )
    return None if weights is None else named.get(weights)


def _timm(name: str, weights: str | None) -> tuple[bool, Callable[..., nn.Module]]:
    """Returns whether `weights` are pretrained ones, and the factory with them."""
    timm = _timm_with(name)
    pretrained = weights == "DEFAULT"

    def build(**arguments: Any) -> nn.Module:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
        return network

    return pretrained, build


def _timm_with(name: str) -> Any:
    """Returns the package timm, which has a network of that name."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"timm:{name} needs the package timm; install it with: pip install 'paretoprune[timm]'"
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ValueError(f"unknown timm model {name!r}; {close_matches(name, known)}")
    return timm


def library_preparation(reference: str, weights: str | None) -> Preparation:
    """Returns how a network of torchvision or timm wants its images; builds no network.

    That is as its pretrained weights were tested. timm configures every network, also untrained;
    torchvision has no word on one without weights of its own, which takes the usual images.

    Args:
        reference: `torchvision:NAME` or `timm:NAME`.
        weights: As for `library_network`.

    Raises:
        ValueError: If the library does not know the names.
    """
    library, _, name = reference.partition(":")
    if library == "timm":
        return _timm_preparation(name)
    pretrained = _torchvision_weights(name, weights)
    if pretrained is None:
        return IMAGENET
    plain = pretrained.transforms()
    (size,) = plain.crop_size
    interpolation = plain.interpolation.value
    return Preparation((size, size), tuple(plain.mean), tuple(plain.std), interpolation, plain)


def _timm_preparation(name: str) -> Preparation:
    timm = _timm_with(name)
    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag behind the dot
        raise ValueError(f"unknown timm model {name!r}: {error}") from error
    config = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    plain = timm.data.create_transform(**config)
    _, height, width = config["input_size"]
    interpolation = config["interpolation"]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preparation((height, width), mean, std, interpolation, plain)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a file of weights into `model`; nothing in the file is executed.

    Args:
        model: Receives the weights.
        path: A `.safetensors` file, or a `.pt` or `.pth` file with a dictionary of tensors.

    Raises:
        ValueError: If the file is missing or no such file, or its names or shapes are not those
            of the model.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"the weights {str(file)!r} are not a file.")
    state = _read_tensors(file)
    wanted = model.state_dict()
    # Counters of batches change nothing in inference, and converted weights often lack them.
    spared = ("num_batches_tracked", EXTRA_STATE)
    missing = [k for k in wanted if k not in state and not k.endswith(spared)]
    unexpected = [key for key in state if key not in wanted]
    shapes = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: it lacks {_first(missing)} and has in "
            f"excess {_first(unexpected)}."
        )
    if shapes:
        key = shapes[0]
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: {key} has shape "
            f"{tuple(state[key].shape)}, but the model needs {tuple(wanted[key].shape)}"
            f" ({len(shapes)} such)."
        )
    model.load_state_dict(state, strict=False)


def _first(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words advise to run what it holds
        raise ValueError(
            f"{file} cannot be read as weights: it is damaged, or holds something else than "
            f"tensors, which is not read because that could run code; save a state_dict()."
        ) from error
    except Exception as error:  # each reader has its own errors for a damaged file
        raise ValueError(f"{file} cannot be read as weights: {first_line(error)}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} must hold a dictionary of tensors, a state dict.")
    return state
