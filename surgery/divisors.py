"""Divisors: parameters whose zeros would make masked units infinite instead of zero."""

from __future__ import annotations

from paretoprune.surgery.program import Node, Program, Ref
from paretoprune.surgery.rules import RULES, rule_of

_DIVIDES = {"reciprocal", "rsqrt", "log", "log2", "log10"}


def find_divisors(program: Program) -> frozenset[tuple[str, int]]:
    """Returns the axes along which a parameter or buffer stays as it is when a unit is masked.

    A value divided by one (an activation norm of fixed statistics) is zero when its own layer is,
    and not a number once its divisor is zero, too. The rows of a weight that are given lengths
    (weight norm) are divided by the lengths they had, and zero when the lengths they get are.

    Args:
        program: The dense network.
    """
    origins: dict[str, set[str]] = {}
    found: set[tuple[str, int]] = set()
    ranks = {n.target: len(n.shape or ()) for n in program.nodes.values() if n.kind == "parameter"}
    for node in program.nodes.values():
        refs = list(node.refs())
        if node.kind == "parameter":
            origins[node.name] = {node.target}
        elif node.operator == "_weight_norm":
            lengths = program.nodes[refs[1]].shape or ()
            found |= {
                (name, axis)
                for name in origins.get(refs[0], ())
                for axis, size in enumerate(lengths)
                if size != 1
            }
        elif refs and all(ref in origins for ref in refs) and not _adds_up(node):
            origins[node.name] = set[str]().union(*(origins[ref] for ref in refs))
        for name in origins.get(_divisor(node), ()):
            found |= {(name, axis) for axis in range(ranks[name])}
    return frozenset(found)


def _adds_up(node: Node) -> bool:
    """Whether a value is made of many elements, of which zeros are but some."""
    return rule_of(node.target) in (RULES["aten.sum"], RULES["aten.matmul"], RULES["aten.linear"])


def _divisor(node: Node) -> str:
    """Returns the name of the value by which a node divides; empty if it does not."""
    position = (
        0 if node.operator in _DIVIDES else 1 if node.operator in ("div", "divide") else None
    )
    if position is None or len(node.args) <= position or not isinstance(node.args[position], Ref):
        return ""
    return str(node.args[position].name)
