"""Grammars (llguidance's Lark) for answers that must be calls, or must come after thoughts."""

import json
import re
from collections.abc import Sequence
from typing import Any

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import GenerationError
from moesaic.serve.request import Grammar
from moesaic.serve.tools.formats import Format
from moesaic.serve.tools.parts import Tool
from moesaic.serve.tools.spelling import Maybe, Piece, Words

# Small models write spaces without end where they may.
_SPACES = r" ?|\n{1,2}[ \t]{0,20}"
_WORDS = "/[^<]*/"


class GrammarWriter:
    """Writes texts as a tokenizer makes tokens of them: what it has a token of its own for must be that token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.backend.get_added_tokens_decoder()
        self._ids = {token.content: token_id for token_id, token in added.items() if token.content}
        names = sorted(self._ids, key=len, reverse=True)
        self._own = re.compile("|".join(re.escape(name) for name in names)) if names else None

    def calls(self, form: Format, tools: Sequence[Tool], *, many: bool, closing: str | None) -> Grammar:
        """One call of one of the tools, or `many`; behind the end of thoughts where these must be closed first."""
        rules = [self._call(form, tool, index) for index, tool in enumerate(tools)]
        choice = " | ".join(f"call_{index}" for index in range(len(tools)))
        more = f" ({self._text(form.between)} call)*" if many else ""
        body = f"{self._text(form.opening)} call{more} {self._text(form.closing)}"
        lines = [self._start(closing), f"body: {body}", f"call: {choice}", *(line for rule in rules for line in rule)]
        return Grammar("lark", "\n".join(lines) + "\n")

    def behind(self, grammar: Grammar, opening: str, closing: str | None) -> Grammar:
        """A grammar of what comes behind a text, or behind the end of thoughts."""
        start = f"start: {self._text(opening)} body" if closing is None else self._start(closing)
        return Grammar("lark", f"{start}\n{_as_body(grammar)}\n")

    def _start(self, closing: str | None) -> str:
        if closing is None:
            return "start: body"
        if closing in self._ids:
            return f"start: thoughts <[{self._ids[closing]}]> spaces body\nthoughts: /(.|\\n)*/\nspaces: /\\n{{0,2}}/"
        return f"start: thoughts spaces body\nthoughts[suffix={json.dumps(closing)}]: /(.|\\n)*/\nspaces: /\\n{{0,2}}/"

    def _call(self, form: Format, tool: Tool, index: int) -> list[str]:
        places: list[str] = []
        body = self._pieces(form.spelled(tool), f"call_{index}", places)
        return [f"call_{index}: {body}", *places]

    def _pieces(self, pieces: Sequence[Piece], name: str, places: list[str]) -> str:
        """Pieces in a row; what stands in their places becomes rules of its own."""
        found = []
        for piece in pieces:
            if isinstance(piece, str):
                found.append(self._text(piece))
            elif isinstance(piece, Maybe):
                found.append(f"({self._pieces(piece.pieces, name, places)})?")
            else:
                place = f"{name}_{len(places)}"
                places.append(f"{place}: {_WORDS if isinstance(piece, Words) else _schema(piece.schema)}")
                found.append(place)
        return " ".join(found)

    def _text(self, text: str) -> str:
        """A text as literals and tokens."""
        found, place = [], 0
        for own in self._own.finditer(text) if self._own else ():
            found += [_literal(text[place : own.start()]), f"<[{self._ids[own[0]]}]>"]
            place = own.end()
        return " ".join(part for part in (*found, _literal(text[place:])) if part)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _schema(schema: Any) -> str:
    spaced = {**schema, "x-guidance": {"whitespace_pattern": _SPACES}} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(spaced)}"


def _as_body(grammar: Grammar) -> str:
    """A grammar as the rule `body`."""
    if grammar.kind == "lark":
        return re.sub(r"^start\b", "body", grammar.text, flags=re.MULTILINE)
    if grammar.kind == "regex":
        escaped = re.sub(r"(?<!\\)/", r"\/", grammar.text)
        return f"body: /{escaped}/"
    return f"body: {_schema(_parsed(grammar))}"


def _parsed(grammar: Grammar) -> Any:
    """The schema that a grammar is."""
    try:
        return {"type": "object"} if grammar.kind == "json_object" else json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"a JSON schema that is not JSON: {error}") from error
