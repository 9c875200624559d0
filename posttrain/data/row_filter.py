"""Rows chosen by an expression: `data.where`, in the Common Expression Language.

CEL is made for expressions of strangers: it has neither loops nor side effects, its patterns take linear time, and a
row's columns are all that it sees. What could still make much of little (its macros over lists, and adding up texts) is
refused when an expression is compiled. The language: https://github.com/google/cel-spec.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.data.conversation import RowError
from posttrain.data.formats.fields import listed
from posttrain.data.readers import Row
from posttrain.errors import UserError

if TYPE_CHECKING:
    from cel import Program

LONGEST = 1000  # characters of an expression; its parser is recursive
DEEPEST = 100  # lists and objects within each other in a column, which CEL copies recursively
ROW = "row"  # the whole row, for columns whose names are no identifiers, and for `has(row.name)`
# Operators and functions, as CEL names them.
OPERATORS = {"_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_", "_&&_", "_||_", "!_", "@in", "_[_]", "_?_:_"}
ARITHMETIC = {"-_", "_-_", "_*_", "_/_", "_%_"}
FUNCTIONS = {"size", "contains", "startsWith", "endsWith", "matches", "int", "double", "string", "timestamp"}
# What other languages write, and CEL otherwise.
SPELLINGS = ((r"\band\b", "&&"), (r"\bor\b", "||"), (r"\bnot\b", "!"), (r"(?<![=!<>])=(?!=)", "=="), ("<>", "!="))
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
KIND = "data.where is false"


class LeftOut(RowError):
    """A row that `data.where` leaves out: counted, and never an error."""


def compile_where(expression: str) -> "Program":
    """Compile an expression.

    Raises:
        UserError: it isn't one of CEL, or not one that is known to end soon.
    """
    if len(expression) > LONGEST:
        raise UserError(f"data.where: has more than {LONGEST} characters")
    import cel  # loads a second's worth of its own command line

    try:
        program = cel.compile(expression)
    except ValueError as error:
        reason = str(error).partition("Syntax error: ")[2].partition("\n")[0] or "a syntax error"
        raise UserError(f"data.where={expression}: {reason[:200]}{_spelling(expression)}") from None
    if set(program.functions()) - OPERATORS - ARITHMETIC - FUNCTIONS:
        raise UserError(
            f"data.where={expression}: what may be used are comparisons, in, &&, ||, !, has(), - * / % and "
            f"{', '.join(sorted(FUNCTIONS))}; neither + nor macros over lists (exists, all, map, filter), which could "
            "take any time"
        )
    return program


def _spelling(expression: str) -> str:
    """What a part of an expression that is another language's is in CEL."""
    outside = re.sub(r"\"[^\"]*\"|'[^']*'", "''", expression)
    for pattern, instead in SPELLINGS:
        if re.search(pattern, outside):
            return f"; write {instead} for {re.search(pattern, outside)[0]}"  # type: ignore[index]
    return '; an example: lang == "en" && size(text) > 100'


def chosen(rows: Iterable[Row], expression: str) -> Iterator[Row]:
    """Rows of which `expression` is true; the others as `LeftOut`, those that it can't be asked of as a RowError."""
    program = compile_where(expression)
    for place, row in rows:
        if isinstance(row, RowError):
            yield place, row
            continue
        try:
            yield place, row if _is_true(program, row) else LeftOut(KIND, KIND)
        except RowError as error:
            yield place, error


def _is_true(program: "Program", row: Mapping[str, Any]) -> bool:
    variables = program.variables()
    columns = {name: row[name] for name in variables if name in row}
    if ROW in variables:
        columns = {ROW: row, **row}
    elif len(columns) < len(variables):
        raise _missing(variables, row)
    if not all(map(_is_shallow, columns.values())):
        raise RowError("data.where: a column is nested too deeply", "data.where: nested too deeply")
    try:
        value = program.execute(columns)
    except KeyError as error:
        raise RowError(
            f"data.where: there is no {error}; has(...) asks whether it is there", "data.where: a key is missing"
        ) from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        if "Undefined variable" in str(error):
            raise _missing(variables, row) from None
        kinds = ", ".join(f"{name} is {_kind(row[name])}" for name in variables if name in row)
        reason = str(error).partition(". ")[0]
        raise RowError(
            f"data.where={program.source}: {reason}: {kinds}. double(x) is the number of a text",
            "data.where: values of another kind",
        ) from None
    if not isinstance(value, bool):
        raise RowError(
            f"data.where={program.source}: is {str(value)[:40]!r}, neither true nor false; compare it with something",
            "data.where: neither true nor false",
        )
    return value


def _missing(variables: Iterable[str], row: Mapping[str, Any]) -> RowError:
    name = next(name for name in variables if name not in row and name != ROW)
    return RowError(
        f"data.where: there is no column `{name}`; found {listed(row)}. Where some rows have it: "
        f"has({ROW}.{name}) && ...",
        f"data.where: no column `{name}`",
    )


def _is_shallow(value: object, left: int = DEEPEST) -> bool:
    """Whether no list or object in a value is within more than `left` others."""
    inner: Iterable[object] = ()
    if isinstance(value, list):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    containers = [item for item in inner if isinstance(item, list | dict)]
    if not left:
        return not containers
    return all(_is_shallow(item, left - 1) for item in containers)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return KINDS.get(type(value), "an object")
