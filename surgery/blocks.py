"""Finds residual blocks that become the identity once their branch is zero."""

from __future__ import annotations

from collections.abc import Callable

from paretoprune.surgery.graph import Extent
from paretoprune.surgery.program import Node, Program, Ref

_PASS = {"dropout", "feature_dropout", "contiguous", "clone", "alias", "detach"}
_SAME_ORDER = {"to", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
_NON_NEGATIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax"}
_KEEPS_SIGN = {
    *_PASS,
    "add",
    "mul",
    "cat",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "slice",
    "pad",
}
_READS_NUMBERS = {"add", "mul", "pad"}  # operands, factors and fill values, not dims


def find_blocks(program: Program) -> dict[str, Extent]:
    """Returns the removable blocks by module name.

    A module is one if it is called once, shares no parameter, returns one value of the shape of
    one that it reads, and what it returns is that input once every other operand of the additions
    on the way is zero. A ReLU on that way is the identity only for a non-negative input, which is
    proved from the operators that made the input. A stage, which is a chain of blocks, is left
    out.
    """
    users = program.users()
    found: dict[tuple[str, str], tuple[str, Extent]] = {}
    for module, nodes in _single_calls(program).items():
        extent = _extent(program, users, nodes)
        if extent is None:
            continue
        key = (extent.source, extent.result)
        if key not in found or len(module) > len(found[key][0]):  # the innermost of equal ones
            found[key] = (module, extent)
    extents = dict(found.values())
    return {
        module: extent
        for module, extent in extents.items()
        if not any(_chains(extent, other) for other in extents.values())
    }


def _chains(whole: Extent, part: Extent) -> bool:
    """Whether `part` is one link of `whole`: a stage of blocks is no block of its own."""
    return whole is not part and part.branches < whole.branches


def _single_calls(program: Program) -> dict[str, dict[str, Node]]:
    members: dict[str, dict[str, Node]] = {}
    twice: set[str] = set()
    for node in program.nodes.values():
        for call in node.calls:
            if "@" in call:
                twice.add(call.split("@")[0])
            members.setdefault(call, {})[node.name] = node
    return {
        name: nodes for name, nodes in members.items() if name not in twice and "@" not in name
    }


def _extent(
    program: Program, users: dict[str, list[Node]], nodes: dict[str, Node]
) -> Extent | None:
    def outside(name: str) -> bool:
        return name not in nodes and program.nodes[name].kind in ("call", "input")

    sources = {ref for node in nodes.values() for ref in node.refs() if outside(ref)}
    results = [
        name
        for name in nodes
        if name in program.outputs or any(user.name not in nodes for user in users[name])
    ]
    if len(results) != 1 or _shares_parameters(program, users, nodes):
        return None
    result = results[0]
    for source in sorted(sources):  # the branch alone reads others, such as a mask
        branches: set[str] = set()
        if (
            program.nodes[source].shape == program.nodes[result].shape
            and _reduces(program, nodes, result, source, branches)
            and branches
            and branches <= nodes.keys()
            and not _depends(program, sources - {source}, source)
        ):
            return Extent(source, result, frozenset(nodes), frozenset(branches))
    return None


def _depends(program: Program, names: set[str], source: str) -> bool:
    """Whether any of some values is computed from another: it is part of the same block then."""
    waiting, seen = list(names), set(names)
    while waiting:
        for ref in program.nodes[waiting.pop()].refs():
            if ref == source:
                return True
            if ref not in seen:
                seen.add(ref)
                waiting.append(ref)
    return False


def _shares_parameters(
    program: Program, users: dict[str, list[Node]], nodes: dict[str, Node]
) -> bool:
    read = {ref for node in nodes.values() for ref in node.refs()}
    return any(
        user.name not in nodes
        for name in read
        if program.nodes[name].kind == "parameter"
        for user in users[name]
    )


def _reduces(
    program: Program, nodes: dict[str, Node], name: str, source: str, branches: set[str]
) -> bool:
    """Whether the value is the block's input once the values added to `branches` are zero."""
    if name == source:
        return True
    if name not in nodes:
        return False
    node = nodes[name]
    operator = node.operator
    tensors = [argument.name for argument in node.args if isinstance(argument, Ref)]

    def reduces(operand: str) -> bool:
        return _reduces(program, nodes, operand, source, branches)

    if operator in _PASS or operator in _SAME_ORDER:
        return reduces(tensors[0])
    if operator == "relu":
        return reduces(tensors[0]) and _non_negative(program, source)
    if operator == "add" and len(tensors) == 2 and not node.kwargs:
        shortcut = [operand for operand in tensors if reduces(operand)]
        others = {operand for operand in tensors if operand not in shortcut}
        if len(shortcut) == 1 and all(program.nodes[name].kind == "call" for name in others):
            branches |= others
            return True
    return False


def _non_negative(program: Program, name: str) -> bool:
    """Whether the operators that made a value prove that it has no negative element."""
    known: dict[str, bool] = {}

    def visit(name: str) -> bool:
        if name not in known:
            node = program.nodes[name]
            operator = node.operator
            known[name] = operator in _NON_NEGATIVE or (
                operator == "hardtanh" and len(node.args) > 1 and node.args[1] >= 0
            )
            if not known[name] and operator in _KEEPS_SIGN:
                known[name] = _all(visit, node)
        return known[name]

    return visit(name)


def _all(visit: Callable[[str], bool], node: Node) -> bool:
    """Whether all operands are non-negative, numbers in the code included."""
    counts = node.operator in _READS_NUMBERS
    numbers = [value for value in (*node.args, *node.kwargs.values()) if counts]
    return all(visit(name) for name in node.refs()) and not any(
        isinstance(value, (int, float)) and value < 0 for value in numbers
    )
