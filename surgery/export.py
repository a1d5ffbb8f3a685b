"""Exports a model to a program with `torch.export`."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import operator
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy

from paretoprune.surgery.errors import UnsupportedModel
from paretoprune.surgery.program import (
    BatchSize,
    Node,
    Program,
    Ref,
    as_call,
    references,
    resolve_target,
    shared_copy,
)

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Modules of torch that run another one, by class name, and their attribute that holds it."""
_SIZES = {
    "size", "sizes", "shape", "repeats", "split_size", "split_sizes", "start", "end", "groups",
}  # fmt: skip
_TRIES = 3
_PRIMES = (97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173)
_END = 2**63 - 1  # what a slice without end has as its end
# Says where a value was when it was traced, which is no part of what the network computes.
_WHERE_IT_WAS = "aten._assert_tensor_metadata.default"


def export_program(model: nn.Module, example_inputs: Any) -> Program:
    """Exports `model` in eval mode; the model itself is left untouched.

    Which of the sizes in its code are batch sizes is told by their being divisible by a prime that
    divides no other: the batch that is exported has that size. Export computes nothing, so that a
    large batch costs no more than a small one. Where the prime divides two sizes of one value, one
    of them may be no batch size but computed by chance, and another prime is tried.

    Args:
        model: Any module that `torch.export` accepts.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        UnsupportedModel: If `torch.export` refuses the model, or it returns no floating-point
            tensor, wraps another module, or has parameters without a shape, without values or on
            another device than the inputs.
    """
    _demand_plain(model)
    args, kwargs = as_call(example_inputs)
    _demand_one_device(model, (args, kwargs))
    rows = _batch(args, kwargs)
    sizes = [tensor.shape for tensor in (*model.parameters(), *model.buffers())]
    sizes += [leaf.shape[1:] for leaf in _tensors((args, kwargs))]
    primes = (p for p in _PRIMES if not any(_divides(p, shape) for shape in sizes))
    first: Program | None = None
    for prime in itertools.islice(primes, _TRIES):
        try:
            program = _export(model, *_with_rows((args, kwargs), rows, prime))
        except UnsupportedModel:  # the model may take no other batch size
            break
        nodes = {node.name: _with_batch_sizes(node, prime) for node in program.nodes.values()}
        program = dataclasses.replace(program, nodes=nodes, unrolled=_unrolled(program, prime))
        first = first or program
        if not any(_divides(prime, node.shape) > 1 for node in nodes.values()):
            return program
    return first or _export(model, args, kwargs)


def _demand_one_device(model: nn.Module, inputs: Any) -> None:
    """Raises `UnsupportedModel` if a model on one device is given inputs on another."""
    there = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    given = {leaf.device for leaf in _tensors(inputs)}
    if len(there) == 1 and given - there:
        raise UnsupportedModel(
            f"{type(model).__name__} is on {next(iter(there))}, but example inputs are on "
            f"{next(iter(given - there))}; move them there."
        )


def _with_rows(inputs: Any, rows: int, wanted: int) -> Any:
    """Returns inputs with another number of examples, whose values are never read."""

    def many(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == rows
        return value.new_empty((wanted, *value.shape[1:])) if whole else value

    return torch.utils._pytree.tree_map(many, inputs)


def _unrolled(program: Program, prime: int) -> str | None:
    """Returns the first module that takes the examples of a batch one by one.

    Args:
        program: Exported with a batch of `prime` examples.
        prime: Their number.
    """
    picked: Counter[tuple[str, int]] = Counter()
    for node in program.nodes.values():
        if node.operator not in ("unbind", "select"):
            continue
        source: Any = program.nodes[next(node.refs())].shape
        dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(source)
        picked[next(node.refs()), dim] += 1 if node.operator == "select" else prime
        if source[dim] == prime and picked[next(node.refs()), dim] >= prime:
            return node.module
    return None


def _divides(prime: int, shape: Any) -> int:
    """Returns how many sizes of a shape a prime divides; of several shapes, the most of any."""
    if shape and not isinstance(shape[0], int):
        return max(_divides(prime, part) for part in shape)
    return sum(size > 0 and size % prime == 0 for size in shape or ())


def _demand_plain(model: nn.Module) -> None:
    """Raises `UnsupportedModel` if a network is wrapped, or lacks the shape or values of some."""
    kind = type(model).__name__
    if kind in _WRAPPERS and type(model).__module__.startswith("torch."):
        raise UnsupportedModel(
            f"{kind} runs another module; trace the one inside, its attribute {_WRAPPERS[kind]}."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UnsupportedModel(
                f"{name} of {kind} has no shape yet; run one forward pass first."
            )
        if tensor.is_meta:
            raise UnsupportedModel(
                f"{name} of {kind} is on the meta device and has no values to compare; build the "
                f"network on the CPU, or load its weights (`load_state_dict(..., assign=True)`)."
            )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _with_batch_sizes(node: Node, prime: int) -> Node:
    """Returns the node with `BatchSize` for the sizes among its arguments that the prime divides.

    Args:
        node: Any node.
        prime: Size of the batch that was exported.
    """

    def mark(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(mark(item) for item in value)
        if type(value) is int and 0 < value < _END and value % prime == 0:
            return BatchSize(value)
        return value

    if node.kind != "call" or not node.target.startswith("aten."):
        return node
    names = [argument.name for argument in resolve_target(node.target)._schema.arguments]
    args = tuple(  # defaults may be missing
        mark(value) if name in _SIZES or (node.operator, name) == ("tile", "dims") else value
        for name, value in zip(names, node.args, strict=False)
    )
    return dataclasses.replace(node, args=args)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences `torch.export`, which warns, and prints its half-made graph before it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def unfused() -> Iterator[None]:
    """Keeps torch's transformer layers from running as one operator, which hides what is in it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    try:
        # Without gradients, a `torch.no_grad()` in the model's code makes no graph of its own.
        with _quiet(), unfused(), torch.no_grad():
            copied = shared_copy(model).eval()
            copied.register_forward_hook(lambda *call: _tree_of_tensors(call[2]))
            exported = torch.export.export(copied, args, kwargs or None, strict=False)
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        said = textwrap.shorten(line, 300, placeholder=" …")
        raise UnsupportedModel(
            f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: "
            f"{said}); wrap the model in a module whose forward avoids that construct, or "
            f"pass example inputs that take another path."
        ) from error
    nodes: dict[str, Node] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = _first_names(model)
    state = {InputKind.PARAMETER, InputKind.BUFFER}
    outputs: tuple[str, ...] = ()
    for fx_node in exported.graph.nodes:
        shape = _shape(fx_node.meta.get("val"))
        name = fx_node.name
        if fx_node.op == "placeholder":
            spec = specs[name]
            if spec.kind in state:
                nodes[name] = Node(name, "parameter", names[str(spec.target)], shape=shape)
            elif spec.kind == InputKind.USER_INPUT:
                nodes[name] = Node(name, "input", name, shape=shape)
            else:
                value = exported.constants.get(str(spec.target))
                nodes[name] = Node(name, "constant", str(spec.target), shape=shape, value=value)
        elif fx_node.op == "call_function":
            target = _target_name(fx_node.target)
            if target == _WHERE_IT_WAS:
                continue
            calls, module = _stack(fx_node.meta)
            nodes[name] = Node(
                name,
                "call",
                target,
                args=_plain(fx_node.args),
                kwargs=_plain(dict(fx_node.kwargs)),
                shape=shape,
                module=module,
                calls=calls,
            )
        elif fx_node.op == "output":
            outputs = tuple(references(_plain(fx_node.args)))
            _demand_floats(model, fx_node)
        else:  # a higher-order operator's body (torch.cond and friends)
            raise UnsupportedModel(
                f"{type(model).__name__} runs a graph inside its graph ({fx_node.target}): "
                f"torch.autocast, torch.enable_grad or control flow that depends on data, which "
                f"surgery cannot follow; pass a module without it."
            )
    return Program(nodes, outputs, _batch(args, kwargs), tuple(kwargs))


def _tree_of_tensors(returned: Any) -> Any:
    """Returns what a network returns without what torch cannot look into, such as a cache."""

    def known(leaf: Any) -> Any:
        plain = leaf is None or isinstance(leaf, (Tensor, int, float, str, bool))
        return leaf if plain else None

    return torch.utils._pytree.tree_map(known, returned)


def _demand_floats(model: nn.Module, output: torch.fx.Node) -> None:
    """Raises `UnsupportedModel` if nothing that a network returns can be compared."""
    returned = [node.meta.get("val") for node in output.all_input_nodes]
    if not any(value.is_floating_point() for value in returned if isinstance(value, Tensor)):
        raise UnsupportedModel(
            f"{type(model).__name__} returns no floating-point tensor, so that nothing can be "
            f"compared; trace a module that returns e.g. the logits."
        )


def _first_names(model: nn.Module) -> dict[str, str]:
    """Returns, for every name of a parameter or buffer, the first name of the same tensor.

    That is the one that `named_parameters()` lists; `torch.export` uses the last.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }


def _target_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    raise UnsupportedModel(
        f"surgery cannot follow the operator {target}; use a module without it."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        try:
            return tuple(int(size) for size in value.shape)
        except RuntimeError as error:
            raise UnsupportedModel(
                "the code makes a tensor whose size depends on values (a mask as an index, "
                "nonzero, unique), which surgery cannot follow; wrap the model in a module "
                "whose forward avoids it."
            ) from error
    if isinstance(value, (tuple, list)):
        return tuple(_shape(item) for item in value)
    return None


def _stack(meta: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    calls: list[str] = []
    module = ""
    for key, (path, _) in meta.get("nn_module_stack", {}).items():
        if path:
            calls.append(path if "@" not in str(key) else f"{path.split('@')[0]}@{key}")
            module = path.split("@")[0]
    return tuple(calls), module


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in torch.utils._pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 1
