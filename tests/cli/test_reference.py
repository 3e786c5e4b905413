"""docs/cli.md is what the parsers say, and the options are these and no others."""

from pathlib import Path

import pytest

from moesaic.cli.main import VERBS, main_parser, verb_parser
from moesaic.cli.reference import COMMAND, options, reference, spelling

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

EVERYWHERE = ["--debug", "--verbose"]
WRITING = [
    "--max-new-tokens N",
    "--temperature T",
    "--top-k K",
    "--top-p P",
    "--seed N",
    "--dtype {fp32,bf16}",
    "--device DEVICE",
    "--bits {4,8}",
    "--experts-bits {4,8}",
    "--values {even,uneven}",
    "--json",
]
OPTIONS = {
    "demo": ["--minutes M", "--out FOLDER", "--seed N", "--corpus FOLDER", "--json"],
    "pack": [
        "CORPUS",
        "--out FOLDER",
        "--tokenizer FOLDER",
        "--vocab-size N",
        "--sentinels N",
        "--workers N",
        "--json",
    ],
    "align": ["LANGUAGE=FILE", "--out FILE", "--unit {paragraph,sentence}", "--json"],
    "train": [
        "--out FOLDER",
        "--size SIZE",
        "--config FILE",
        "--set TABLE.FIELD=VALUE",
        "--sweep [TABLE.FIELD=V,V]",
        "--corpus FOLDER",
        "--resume",
        "--doctor {advise,act,off}",
        "--tensorboard",
        "--watch",
        "--no-browser",
        "--prometheus",
        "--profile [STEPS]",
        "--print-recipe",
        "--json",
    ],
    "generate": ["MODEL", "--prompt TEXT", "--prompt-file FILE", "--target-prefix TEXT", *WRITING],
    "chat": ["[MODEL]", "--prompt TEXT", "--system TEXT", *WRITING],
    "inspect": [
        "MODEL",
        "--data TEXT",
        "--against OTHER",
        "--tokenizer FOLDER",
        "--out FILE",
        "--max-tokens N",
        "--sequence-length N",
        "--json",
    ],
    "watch": ["RUN", "--port N", "--no-browser", "--json"],
    "doctor": [
        "CHECKPOINT",
        "--against EARLIER",
        "--data TEXT",
        "--max-tokens N",
        "--sequence-length N",
        "--dtype {fp32,bf16}",
        "--json",
    ],
    "trace": [
        "MODEL",
        "--out FILE",
        "--text FILE",
        "--corpus FOLDER",
        "--max-tokens N",
        "--sequence-length N",
        "--dtype {fp32,bf16}",
        "--json",
    ],
    "count": [
        "[MODEL]",
        "--all",
        "--plot FILE",
        "--context N",
        "--dtype {fp32,bf16,fp16,fp8,int8,int4}",
        "--json",
    ],
    "plan": [
        "[MODEL]",
        "--machine NxDEVICE",
        "--task {serve,train}",
        "--format FORMAT",
        "--cache {bf16,fp8,int8}",
        "--context N",
        "--users N",
        "--layout A=N,..",
        "--routing FILE",
        "--speculate N[,A]",
        "--workload A=V,..",
        "--price AMOUNT",
        "--against NAME,..",
        "--tokens N",
        "--set NAME=VALUE",
        "--report FILE",
        "--plot FILE",
        "--json",
    ],
    "convert": [
        "MODEL",
        "OUT_FOLDER",
        "--dtype {fp32,bf16,fp16,fp8,mxfp4}",
        "--layout {per-expert,fused}",
        "--max-shard-size SIZE",
        "--upcycle COPIESxSHARDS",
        "--check",
        "--allow-extra",
        "--overwrite",
        "--json",
    ],
    "quantize": [
        "MODEL",
        "--bits {8,4}",
        "--experts-bits {8,4}",
        "--head-bits {16,8,4}",
        "--values {even,uneven}",
        "--group {32,64,128}",
        "--out FOLDER",
        "--data [CORPUS]",
        "--max-tokens N",
        "--sequence-length N",
        "--overwrite",
        "--json",
    ],
    "lint": ["SETUP", "--set TABLE.FIELD=VALUE", "--ranks N", "--json"],
    "serve": [
        "[MODEL]",
        "--host HOST",
        "--port N",
        "--bits {4,8}",
        "--experts-bits {4,8}",
        "--values {even,uneven}",
        "--dtype {fp32,bf16}",
        "--threads N",
        "--max-length N",
        "--cache SIZE",
        "--max-running N",
        "--queue N",
        "--api-key-file FILE",
        "--cors-origin URL",
        "--tls-cert FILE",
        "--tls-key FILE",
        "--drain-seconds S",
        "--replicas N",
        "--ray-address ADDRESS",
        "--log-format {text,json,none}",
        "--log-prompts",
        "--config FILE",
        "--set TABLE.FIELD=VALUE",
        "--json",
    ],
    "loadtest": [
        "URL",
        "--model NAME",
        "--rate R",
        "--concurrency N",
        "--requests N",
        "--duration S",
        "--prompt-tokens N",
        "--output-tokens N",
        "--prefix-tokens N",
        "--prefixes N",
        "--chat",
        "--field NAME=VALUE",
        "--seed N",
        "--plot FILE",
        "--json",
    ],
    "bench": [
        "MODEL",
        "--bits {8,4}",
        "--experts-bits {8,4}",
        "--values {even,uneven}",
        "--batch N,N",
        "--prefill N",
        "--threads N",
        "--samples N",
        "--plot FILE",
        "--json",
    ],
}


def test_options_before_the_verb():
    assert [spelling(action) for action in options(main_parser())] == ["--version", *EVERYWHERE]


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_frozen(verb):
    assert [spelling(action) for action in options(verb_parser(verb))] == [*OPTIONS[verb], *EVERYWHERE]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(verb):
    assert all(action.help for action in options(verb_parser(verb)))


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == reference(), f"docs/cli.md is stale; run `{COMMAND}`"
