"""The prefix cache: full blocks of texts stay while nobody needs the room, and begin later texts of the same tokens.

A tree: behind the root, and behind each block, the blocks that have followed it, found by the hash of their tokens and
then compared token by token. What a block holds is determined by its tokens and those before it: the engine gives a
token the same bits however it runs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moesaic.engine.cache import BLOCK_TOKENS, BlockCache, Text


class Node:
    """A full block that texts may share. key: a hash of all tokens up to its end."""

    __slots__ = ("block", "children", "key", "parent", "tokens")

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], block: int) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.key = 0 if parent is None else key_after(parent.key, tokens)
        self.children: dict[tuple[int, ...], Node] = {}


@dataclass(eq=False)
class SharedText(Text):
    """A text that may share its blocks. nodes: of its first blocks, those that are in the tree."""

    nodes: list[Node] = field(default_factory=list)


class PrefixCache:
    """Holds full blocks of texts beside these, in a block cache with a limit.

    A block is idle when no text holds it. Idle blocks are let go of when the cache needs room, those first that were
    left the longest time ago, and blocks after those that follow them.
    num_blocks: in the tree. evictions: blocks let go of.
    """

    def __init__(self, cache: BlockCache) -> None:
        assert cache.max_blocks is not None, "blocks would never be let go of"
        self.cache, self.num_blocks, self.evictions = cache, 0, 0
        self._root = Node(None, (), -1)
        # A text holds all blocks before one that it holds, and leaves its last one first: the first here is a leaf.
        self._idle: OrderedDict[Node, None] = OrderedDict()
        cache.reclaim = self._let_go

    @property
    def num_available(self) -> int:
        """Blocks that a text can be given."""
        return self.cache.num_free + len(self._idle)

    def match(self, token_ids: Sequence[int]) -> list[Node]:
        """The longest run of blocks that begins a text and leaves at least one token of it to run."""
        found: list[Node] = []
        node: Node | None = self._root
        for start in range(0, len(token_ids) - BLOCK_TOKENS, BLOCK_TOKENS):
            node = node.children.get(tuple(token_ids[start : start + BLOCK_TOKENS]))
            if node is None:
                break
            found.append(node)
        return found

    def num_idle(self, nodes: Sequence[Node]) -> int:
        """How many of these are held by no text."""
        return sum(node in self._idle for node in nodes)

    def take(self, text: SharedText, nodes: Sequence[Node]) -> None:
        """Begin a new text with blocks that match."""
        assert not text.blocks, "a text that has begun"
        text.nodes, text.blocks = list(nodes), [node.block for node in nodes]
        text.length = BLOCK_TOKENS * len(nodes)
        self.cache.hold(text.blocks)
        for node in nodes:
            self._idle.pop(node, None)

    def publish(self, text: SharedText, token_ids: Sequence[int]) -> None:
        """Let others share the full blocks of a text. One that the tree has already takes the place of the text's own:
        their bits are the same."""
        for place in range(len(text.nodes), text.length // BLOCK_TOKENS):
            parent = text.nodes[-1] if text.nodes else self._root
            tokens = tuple(token_ids[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS])
            node = parent.children.get(tokens)
            if node is None:
                node = parent.children[tokens] = Node(parent, tokens, text.blocks[place])
                self.num_blocks += 1
                self.cache.hold([node.block])
            else:
                self._idle.pop(node, None)
                self.cache.hold([node.block])
                self.cache.let_go([text.blocks[place]])
                text.blocks[place] = node.block
            text.nodes.append(node)

    def release(self, text: SharedText) -> None:
        """Forget a text. What it has published stays while there is room."""
        for node in reversed(text.nodes):
            if self.cache.holders(node.block) == 2:  # the text, and the tree
                self._idle[node] = None
        text.nodes.clear()
        self.cache.cut(text, 0)

    def clear(self) -> None:
        """Let go of all blocks that no text holds."""
        self._let_go(len(self._idle))

    def _let_go(self, count: int) -> None:
        for _ in range(min(count, len(self._idle))):
            node, _ = self._idle.popitem(last=False)
            assert node.parent is not None and not node.children
            del node.parent.children[node.tokens]
            self.num_blocks -= 1
            self.evictions += 1
            self.cache.let_go([node.block])


def key_after(key: int, tokens: tuple[int, ...]) -> int:
    """A hash of all tokens up to a block's end, from that up to its beginning. Two texts may have the same."""
    return hash((key, tokens))


def num_blocks(num_tokens: int) -> int:
    """That hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)
