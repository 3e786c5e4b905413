"""Hash tables, token id -> experts, as files hold them: what no router could follow is found as it is read.

V vocabulary, K choices a token.
"""

from torch import Tensor

from moesaic.config.router import RouterConfig
from moesaic.errors import CheckpointError


def check_table(table_VK: Tensor, router: RouterConfig, what: str, first_token: int = 0) -> None:
    """Raise CheckpointError for a token with an expert that there is not, or with one expert twice.

    what: the table's name, for messages. first_token: of these rows, where they are not all.
    """
    is_unknown = (table_VK < 0) | (table_VK >= router.num_experts)
    if bool(is_unknown.any()):
        row, column = is_unknown.nonzero()[0].tolist()
        raise CheckpointError(
            f"{what} gives token {first_token + row} expert {table_VK[row, column]}; this model has 0 to "
            f"{router.num_experts - 1}, so copy the table again or correct the configuration"
        )
    sorted_VK = table_VK.sort(dim=1).values
    is_repeated = sorted_VK[:, 1:] == sorted_VK[:, :-1]
    if bool(is_repeated.any()):
        row, column = is_repeated.nonzero()[0].tolist()
        raise CheckpointError(
            f"{what} gives token {first_token + row} expert {sorted_VK[row, column]} more than once; a table names "
            f"{table_VK.shape[1]} different ones for each token, so make it anew (moesaic.routing.routers.hash_table)"
        )
