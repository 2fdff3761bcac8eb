"""The walk that greedy and sample-and-match share: at each row a token is chosen, and a child that carries it is followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.records import Draft, Verdict


def walk(draft: Draft, choose: Callable[[int, int], int]) -> tuple[list[int], list[int]]:
    """Follow the draft as far as it agrees with the chosen tokens.

    choose(row, depth): the target's token at a row, `depth` drafted tokens below the pending one.
    Returns the path (indices into `draft.tokens`) and the tokens to emit, one more than the path.
    """
    tokens, parents = draft.tokens, draft.parents
    # Of duplicate siblings the first is kept: they carry the same text.
    child = {} if parents is None else {(parents[i], tokens[i]): i for i in reversed(range(len(tokens)))}
    path: list[int] = []
    emitted: list[int] = []
    node = -1
    while True:
        token = choose(node + 1, len(path))
        emitted.append(token)
        if parents is None:
            following = node + 1 if node + 1 < len(tokens) and tokens[node + 1] == token else None
        else:
            following = child.get((node, token))
        if following is None:
            return path, emitted
        node = following
        path.append(node)


def follow(draft: Draft, chosen: Sequence[int]) -> Verdict | None:
    """What the greedy and the match rule say of a draft, where the target's token at each row is known already.

    chosen: len(draft) + 1 tokens, of which only those of the rows on the accepted path are looked at; None if one of those is
    negative. The labels are outcomes, which for `match` on a draft that was chosen rather than drawn are noisier than its own.
    """
    if draft.parents is not None:
        nodes, emitted = walk(draft, lambda row, _: chosen[row])
        return None if emitted[-1] < 0 else Verdict(tuple(nodes), tuple(emitted), outcome_labels(draft, nodes))
    accepted = 0
    while accepted < len(draft.tokens) and draft.tokens[accepted] == chosen[accepted]:
        accepted += 1
    if chosen[accepted] < 0:
        return None
    path = tuple(range(accepted))
    return Verdict(path, (*draft.tokens[:accepted], chosen[accepted]), (1.0,) * accepted + (0.0,) * (accepted < len(draft.tokens)))


def child_lists(draft: Draft) -> list[list[int]]:
    """Children of each row in draw order, as indices into `draft.tokens`: entry 0 is the pending token's, i + 1 that of token i."""
    if draft.parents is None:
        return [*([i] for i in range(len(draft))), []]
    lists: list[list[int]] = [[] for _ in range(len(draft) + 1)]
    for i, parent in enumerate(draft.parents):
        lists[parent + 1].append(i)
    return lists


def outcome_labels(draft: Draft, path: list[int]) -> tuple[float, ...]:
    """1 for every accepted position, and 0 for the position that was refused, if there was one."""
    last = path[-1] if path else -1
    refused = last in draft.parents if draft.parents is not None else last + 1 < len(draft)
    return (1.0,) * len(path) + (0.0,) * refused
