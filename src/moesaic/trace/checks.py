"""What must hold of a trace's arrays, when they are written and when they are read. T tokens, E experts, R rows."""

import numpy as np

from moesaic.trace.layout import TOKEN_DTYPES, WEIGHT_DTYPES, id_dtype
from moesaic.trace.rows import TokenRows


def wrong_rows(rows: TokenRows, num_tokens: int, num_experts: int) -> str | None:
    """What is wrong with rows of T tokens and E experts, in words; None when nothing is."""
    offsets = rows.row_offsets
    if len(offsets) != num_tokens + 1:
        return f"{len(offsets)} row_offsets for {num_tokens} tokens; there must be one more than tokens"
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        return "row_offsets that do not rise from 0"
    if {len(rows.expert_ids_R), len(rows.choices_R), len(rows.weights_R)} != {int(offsets[-1])}:
        lengths = f"{len(rows.expert_ids_R)} experts, {len(rows.choices_R)} choices, {len(rows.weights_R)} weights"
        return f"{lengths} for the {offsets[-1]} rows of row_offsets"
    if rows.weights_R.dtype not in WEIGHT_DTYPES:
        return f"{rows.weights_R.dtype} weights; they must be float32 or float64"
    highest_choice = int(np.iinfo(id_dtype(num_experts)).max)
    return wrong_range("experts", rows.expert_ids_R, 0, num_experts - 1) or wrong_range(
        "choices", rows.choices_R, 0, highest_choice
    )


def wrong_tokens(tokens: dict[str, np.ndarray], num_tokens: int, num_domains: int) -> str | None:
    """What is wrong with facts about T tokens, by the names they have in the file; None when nothing is."""
    for name, values_T in tokens.items():
        if values_T.shape != (num_tokens,):
            return f"{name} of shape {values_T.shape} for {num_tokens} tokens"
        if name == "mask":
            if values_T.dtype != np.bool_:
                return f"a mask of {values_T.dtype}; it must be bool"
            continue
        lowest, highest = (-1, num_domains - 1) if name == "domain_ids" else (0, int(np.iinfo(TOKEN_DTYPES[name]).max))
        if wrong := wrong_range(name, values_T, lowest, highest):
            return wrong
    return None


def wrong_range(name: str, values: np.ndarray, lowest: int, highest: int) -> str | None:
    """Whether integers leave their range, in words."""
    if not np.issubdtype(values.dtype, np.integer):
        return f"{name} of {values.dtype}; they must be integers"
    if values.size and not lowest <= int(values.min()) <= int(values.max()) <= highest:
        return f"{name} from {values.min()} to {values.max()}; they must be {lowest} to {highest}"
    return None
