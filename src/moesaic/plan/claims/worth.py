"""Claims about money and quality."""

import math
from collections.abc import Iterator

from moesaic import families
from moesaic.plan.claims.claim import Claim


def claims() -> Iterator[Claim]:
    """All of this room."""
    yield _saving()
    yield _training_cost()
    yield _as_good_as_its_size()


def _saving() -> Claim:
    saved = (10 - 0.27) * 10
    return Claim(
        "$0.27 instead of $10 per million output tokens saves $980 a month at 10M tokens.",
        "false",
        "(price - price) x million tokens",
        f"(10 - 0.27) x 10 = ${saved:.2f}",
        f"Ten times too much: ${saved:.0f} a month. $973 need 100M tokens.",
    )


def _training_cost() -> Claim:
    hours = 2664 + 119 + 5
    return Claim(
        "DeepSeek-V3 was made for $5.6 million.",
        "it depends",
        "GPU hours x $2",
        f"(2,664K + 119K + 5K) x $2 = ${hours * 2e-3:.3f}M (arXiv:2412.19437, table 1)",
        "True of renting 2,048 H800 for the final run; its own report leaves out research, trials, data, people, and "
        "the machines' price.",
    )


def _as_good_as_its_size() -> Claim:
    mixtral = families.find_preset("mixtral-8x7b")
    rule = math.sqrt(mixtral.total * mixtral.active_all) / 1e9
    return Claim(
        "An MoE is as good as a dense model of its total size.",
        "false",
        "quality on the same data; as a rule of thumb a dense model of sqrt(total x active)",
        "Switch-Base (7.4B) 79.5 on SuperGLUE and T5-Large (0.8B, dense) 82.7; Switch-C (1571B) -1.096 in log "
        "perplexity "
        "and Switch-XXL (395B) -1.086 after the same 250k steps (arXiv:2101.03961); Qwen3 (arXiv:2505.09388): its "
        "MoE is as "
        f"good as dense models of five times its active size, 17B for 30B-A3B. The rule gives {rule:.0f}B for "
        "Mixtral 8x7B",
        "It lies between the dense models of its active and of its total size. Comparisons across recipes prove "
        "nothing: "
        "Mixtral (47B) scored as Llama 2 70B did on MMLU, 70.6 and 69.9.",
    )
