"""What a chat template may spend: a budget of steps, and the payments written into its tree.

The count depends only on template and input, never on the clock or on the thread, so a template
that passes once passes everywhere. A step is worth about half a microsecond, or sixteen characters.
"""

from collections.abc import ItemsView, KeysView, Sized, ValuesView
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateRuntimeError, TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

STEPS = 2_000_000  # for a template alone; each character of input adds a few
# A real template reads each text some twenty times, at 1/16 step a character.
STEPS_PER_CHARACTER = 4
CHARACTERS_PER_STEP = 16
NODES_PER_STEP = 4

_TAG_NAMES = """
    Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock ExprStmt
    Name NSRef Const Tuple List Dict Pair Keyword CondExpr Filter Test Call Getitem Getattr Slice
    Concat Compare Operand Mul Div FloorDiv Add Sub Mod Pow And Or Not Neg Pos Continue Break
"""
_TAGS = frozenset(_TAG_NAMES.split())
WALKED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Budget:
    """The steps one rendering may take, and the message its outermost loop is at (for errors)."""

    def __init__(self, characters: int) -> None:
        """For an input of that many characters."""
        self.limit = STEPS + STEPS_PER_CHARACTER * characters
        self.left = self.limit
        self.message: Any = None

    def spend(self, steps: int) -> None:
        """Takes `steps` away. Raises: TemplateRuntimeError when there are not as many left."""
        self.left -= steps
        if self.left < 0:
            raise TemplateRuntimeError(f"it takes more than {self.limit:,} steps and may never end")

    def text(self, characters: int) -> None:
        """Takes what reading or writing that many characters costs."""
        self.spend(1 + characters // CHARACTERS_PER_STEP)

    def shallow(self, value: Any) -> None:
        """Takes what copying `value` costs: its characters or items, not what the items hold."""
        if isinstance(value, str):
            self.text(len(value))
        elif isinstance(value, Sized):
            self.spend(1 + len(value))

    def walk(self, value: Any) -> None:
        """Takes what reading all of `value` costs, item by item, before anything reads it.

        `[x, x]` nested n deep holds 2**n items in n lists; this ends when the budget does.
        """
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.text(len(item))
                continue
            self.spend(1)
            if isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, WALKED):
                stack.extend(item)
            elif isinstance(item, range):
                self.spend(len(item))


class MeteredContext(Context):
    """A jinja2 context that carries the budget of its rendering."""

    budget: Budget


class Meter(NodeTransformer):
    """Writes the payments into a parsed template, as filters whose names no template can write."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Refuses the tags that chat templates have no use for (they load other templates)."""
        name = type(node).__name__
        if name not in _TAGS:
            raise TemplateSyntaxError(
                f"{name.lower()} is no tag for chat templates", node.lineno or 1
            )
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        """Each pass pays for the body; one over the messages also notes which it is at."""
        steps = nodes.Const(_steps(node), lineno=node.lineno)
        over_messages = any(name.name == "messages" for name in _names(node.iter))
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_apply(steps, "@tick"), node.test, lineno=node.lineno)
        if not over_messages or not isinstance(node.target, nodes.Name):
            node.body.insert(0, _statement(_apply(steps, "@tick")))
            return [node]
        item = nodes.Name(node.target.name, "load", lineno=node.lineno)
        node.body.insert(0, _statement(_apply(item, "@message", steps)))
        nothing = nodes.Const(None, lineno=node.lineno)
        return [node, _statement(_apply(nothing, "@message", steps))]

    def visit_Macro(self, node: Any) -> nodes.Node:
        """Each call pays for the body."""
        steps = nodes.Const(_steps(node), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, _statement(_apply(steps, "@tick")))
        return node

    visit_CallBlock = visit_Macro

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparing reads both sides."""
        self.generic_visit(node)
        node.expr = _apply(node.expr, "@walked")
        for operand in node.ops:
            operand.expr = _apply(operand.expr, "@walked")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` makes a text of anything."""
        self.generic_visit(node)
        return _apply(nodes.List(node.nodes, lineno=node.lineno), "@concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a copy."""
        self.generic_visit(node)
        return _apply(node, "@sliced") if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Hashing a nested tuple, as the key of a mapping, reads all of it."""
        self.generic_visit(node)
        node.key = _apply(node.key, "@walked")
        return node


def _names(node: nodes.Node) -> list[nodes.Name]:
    return ([node] if isinstance(node, nodes.Name) else []) + list(node.find_all(nodes.Name))


def _apply(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _statement(expression: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(expression, lineno=expression.lineno)


def _steps(block: Any) -> int:
    """What one run of a body costs at most. Bodies within it are left out: they pay themselves."""
    count, stack = 0, [*block.body, *getattr(block, "defaults", ())]
    if getattr(block, "test", None) is not None:
        stack.append(block.test)
    while stack:
        node = stack.pop()
        count += 1
        if isinstance(node, nodes.TemplateData):
            count += len(node.data) * NODES_PER_STEP // CHARACTERS_PER_STEP
        inner = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        stack.extend(node.iter_child_nodes(exclude=("body",) if inner else None))
    return 1 + count // NODES_PER_STEP
