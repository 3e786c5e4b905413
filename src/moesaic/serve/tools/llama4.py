"""Llama 4's calls, which no mark announces: Python calls in a list, or JSON objects."""

import ast
import json
from collections.abc import Sequence
from typing import Any

from moesaic.serve.tools.json_calls import call_parts
from moesaic.serve.tools.parts import CallArguments, CallBegun, Part, Parts, Said, Tool
from moesaic.serve.tools.source import Source, each_as

_START, _END = "<|python_start|>", "<|python_end|>"
_CONSTANTS = {"true": True, "false": False, "null": None}


def llama4(source: Source, tools: Sequence[Tool]) -> Parts:
    """[name(key="value"), ...], or {"name": ..., "parameters": {...}} one after another; all of the answer or none.

    Only names of tools count: an answer may begin with a bracket for other reasons.
    """
    following = yield from source.spaces()
    if following == "<":
        following = yield from _behind_start(source)
    if following not in ("[", "{"):
        yield from each_as(Said, source.until())
        return
    text, _ = yield from source.all_until()
    calls = _calls(text.removesuffix(_END).strip(), {tool.name for tool in tools})
    yield from calls or [Said(text)]


def _behind_start(source: Source) -> Any:
    while len(source.text) < len(_START) and _START.startswith(source.text) and not source.closed:
        yield None
    if source.text.startswith(_START):
        source.take(len(_START))
    return (yield from source.spaces())


def _calls(text: str, names: set[str]) -> list[Part]:
    """The calls that a text is; none where it is anything else."""
    try:
        found = _python_calls(text) if text.startswith("[") and not text.startswith("[{") else _json_calls(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    return found if all(part.name in names for part in found if isinstance(part, CallBegun)) else []


def _json_calls(text: str) -> list[Part]:
    calls = json.loads(text) if text.startswith("[") else _one_after_another(text)
    parts = [call_parts(call) for call in calls]
    if None in parts:
        raise ValueError("not a call")
    return [part for call in parts for part in call or ()]


def _one_after_another(text: str) -> list[Any]:
    decoder, found, place = json.JSONDecoder(), [], 0
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        found.append(value)
        while place < len(text) and (text[place].isspace() or text[place] == ";"):
            place += 1
    return found


def _python_calls(text: str) -> list[Part]:
    tree = ast.parse(text, mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("not a list")
    return [part for call in tree.elts for part in _python_call(call)]


def _python_call(call: ast.expr) -> list[Part]:
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name | ast.Attribute):
        raise ValueError("not a call with named arguments")
    arguments = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
    if None in arguments:
        raise ValueError("arguments without a name")
    return [CallBegun(ast.unparse(call.func)), CallArguments(json.dumps(arguments, ensure_ascii=False))]


def _value(tree: ast.expr) -> Any:
    """A literal, with the constants of JSON, too. Raises ValueError for anything else."""
    if isinstance(tree, ast.Name) and tree.id in _CONSTANTS:
        return _CONSTANTS[tree.id]
    if isinstance(tree, ast.List | ast.Tuple):
        return [_value(each) for each in tree.elts]
    if isinstance(tree, ast.Dict):
        return {_value(key): _value(each) for key, each in zip(tree.keys, tree.values, strict=True) if key is not None}
    value = ast.literal_eval(tree)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no value of JSON")
    return value
