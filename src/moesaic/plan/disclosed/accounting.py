"""Rows that follow from counting: parameters, files, caches, hours at a disclosed rate, dollars."""

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.families import _counted
from moesaic.families._published import PUBLISHED
from moesaic.plan.disclosed.row import Row
from moesaic.plan.formats import named, weight_bytes

V3_REPORT = "DeepSeek-V3, arXiv:2412.19437, table 1"
DAY_6 = "deepseek-ai/open-infra-index, day 6"
GSHARD = "GShard, arXiv:2006.16668, table 3"
LMSYS = "lmsys.org, 2025-05-05"
GPT_OSS = "gpt-oss model card, arXiv:2508.10925"
_SCALES = {"M": 1e6, "B": 1e9, "T": 1e12}


def rows() -> list[Row]:
    """All of them, sizes first."""
    return [*_parameters(), *_files(), *_caches(), *_training(), *_serving()]


def _parameters() -> list[Row]:
    """Every preset whose makers state a total."""
    found = []
    for name, published in PUBLISHED.items():
        words = published.total.split()
        number, letter = words[0][:-1], words[0][-1]
        scale = _SCALES[letter]
        if len(words) > 1:  # with a part that is not the language model's
            continue
        model = (
            _counted.count(_counted.PRESETS[name].config) if name in _counted.PRESETS else families.find_preset(name)
        )
        digits = len(number.partition(".")[2])
        how, source = "sum over tensors, tied ones once", "the makers' model card or paper"
        found.append(Row(f"{name}: parameters", letter, float(number), model.total / scale, how, source, digits))
    return found


def _held(name: str, format: str, scale: float) -> float:
    return sum(weight_bytes(families.find_preset(name).parameters(), named(format)).values()) / scale


def _all_in(name: str, bits: float) -> float:
    """GB of all weights in one format."""
    return families.find_preset(name).total * bits / 8 / 1e9


def _files() -> list[Row]:
    v3 = families.find_preset("deepseek-v3")
    card = "deepseek-ai/DeepSeek-V3, README"
    bartowski, bits = "huggingface.co/bartowski/{}-GGUF", "parameters x {} bits"
    gguf = bartowski.format("deepseek-ai_DeepSeek-V3-0324")
    mixtral, q8, q4 = "GGUF files of Mixtral 8x7B [M]", bits.format(8.5), bits.format(4.5)
    with_mtp = (v3.total + v3.mtp_total + 2 * v3.vocab_size * v3.hidden_size) / 1e9
    mxfp4 = "experts 4.25 bits, the rest 16"
    return [
        Row("gpt-oss-120b: file", "GiB", 60.8, _held("gpt-oss-120b", "mxfp4", 2**30), mxfp4, GPT_OSS, 1),
        Row("gpt-oss-20b: file", "GiB", 12.8, _held("gpt-oss-20b", "mxfp4", 2**30), mxfp4, GPT_OSS, 1),
        Row("Mixtral 8x7B, 16 bits", "GB", 93.4, _all_in("mixtral-8x7b", 16), bits.format(16), "safetensors [M]", 1),
        Row("Mixtral 8x7B, Q8_0", "GB", 49.62, _all_in("mixtral-8x7b", 8.5), q8, mixtral, 2),
        Row("Mixtral 8x7B, Q4_0", "GB", 26.44, _all_in("mixtral-8x7b", 4.5), q4, mixtral, 2),
        Row(
            "Mixtral 8x22B, IQ4_NL",
            "GB",
            80.47,
            _all_in("mixtral-8x22b", 4.5),
            q4,
            bartowski.format("Mixtral-8x22B-v0.1"),
            2,
        ),
        Row("DeepSeek-V3, Q8_0", "GB", 713.29, _all_in("deepseek-v3", 8.5), q8, gguf, 2),
        Row("DeepSeek-V3, Q4_1", "GB", 419.94, _all_in("deepseek-v3", 5), bits.format(5), gguf, 2),
        Row("DeepSeek-V3: parameters in its files", "B", 685, with_mtp, "and MTP with its own table and head", card),
        Row("Switch-C, bf16", "GB", 3142, _all_in("switch-c-2048", 16), bits.format(16), "QMoE, arXiv:2310.16795"),
    ]


def _caches() -> list[Row]:
    rows = []
    v32 = families.find_preset("deepseek-v3.2")
    base = _cache_of(v32)
    source = "DeepSeek-V4 report [P]"
    for name, share in (("deepseek-v4-pro", 10), ("deepseek-v4-flash", 7)):
        found = 100 * _cache_of(families.find_preset(name)) / base
        rows.append(Row(f"{name}: cache at 1M tokens, of V3.2's", "%", share, found, "bytes of states, FP8", source))
    for name, size in (("mixtral-8x7b", 131072), ("deepseek-v3", 70272), ("gpt-oss-120b", 73728)):
        model = families.find_preset(name)
        # Before any window is full.
        found = float(model.state_bytes(128)) / 128
        rows.append(Row(f"{name}: cache of a token", "bytes", size, found, "bf16", "its config.json"))
    return rows


def _cache_of(config: ModelConfig) -> float:
    return named("fp8", cache="fp8").state_bytes(config, 1 << 20)


def _training() -> list[Row]:
    hours = 180.0 * 14.8
    days = 180e3 / 2048 / 24
    total = hours + 119 + 5
    found = [
        Row("DeepSeek-V3: pre-training", "K GPU-h", 2664, hours, "180K h per T tokens x 14.8T", V3_REPORT),
        Row("DeepSeek-V3: a trillion tokens on 2048", "days", 3.7, days, "180K h / 2048 / 24", V3_REPORT, 1),
        Row("DeepSeek-V3: all training", "K GPU-h", 2788, total, "and 119K context, 5K post", V3_REPORT),
        Row("DeepSeek-V3: cost", "M$", 5.576, total * 2e-3, "at $2 an hour", V3_REPORT, 3),
        Row("Llama 4 Scout and Maverick", "M GPU-h", 7.38, 5.0 + 2.38, "5.0M and 2.38M", "Llama 4 model card", 2),
    ]
    models = (
        ("2048E 36L", 2048, 4.0, 22.4),
        ("2048E 12L", 2048, 1.4, 7.5),
        ("512E 36L", 512, 11.0, 15.5),
        ("512E 12L", 512, 3.5, 4.9),
        ("128E 36L", 128, 17.3, 6.1),
        ("128E 12L", 128, 5.4, 1.9),
        ("dense 96L", 2048, 42.0, 235.5),
    )
    for name, cores, days, years in models:
        how = f"{cores} cores x {days} days"
        found.append(Row(f"GShard {name}", "core-years", years, cores * days / 365, how, GSHARD, 1))
    return found


def _serving() -> list[Row]:
    prefill, decode = 608e9 / 86400 / 73.7e3, 168e9 / 86400 / 14.8e3
    revenue = 342e3 * 0.14 + 266e3 * 0.55 + 168e3 * 2.19
    cost = 226.75 * 8 * 2 * 24
    million = 8 * 2 / (22282 * 3600 / 1e6)
    rates = "tokens of a day / 73.7k and 14.8k a node"
    return [
        Row("DeepSeek: nodes in use", "nodes", 226.75, prefill + decode, rates, DAY_6, 2),
        Row("DeepSeek: cost of a day", "$", 87072, cost, "226.75 nodes x 8 x $2 x 24 h", DAY_6),
        Row("DeepSeek: revenue of a day", "$", 562027, revenue, "342B x 0.14, 266B x 0.55, 168B x 2.19 $/M", DAY_6),
        Row("DeepSeek: margin", "%", 545, 100 * (562027 / 87072 - 1), "revenue / cost - 1", DAY_6),
        Row("DeepSeek: cached input", "%", 56.3, 100 * 342 / 608, "342B of 608B", DAY_6, 1),
        Row("DeepSeek: prefill, computed", "tok/s/node", 32206, 73.7e3 * (1 - 342 / 608), "73.7k without hits", LMSYS),
        Row("SGLang: a million output tokens", "$", 0.20, million, "8 x $2 an hour / 22,282 tok/s", LMSYS, 2),
    ]
