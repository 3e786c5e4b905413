"""Writes tests/golden/families: `python tests/golden/make_families.py`, from anywhere, in about a minute.

Asks transformers' model of every tiny case (tests/families/cases.py and encoder_decoder_cases.py) for what the fast
tests compare with. The slow tests do the same in memory, and compare it with the files.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moesaic import families

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.families import decoder_oracle, encoder_decoder_oracle
from tests.families.cases import CASES
from tests.families.encoder_decoder_cases import BUILT_BY_THEM
from tests.families.encoder_decoder_cases import CASES as ENCODER_DECODERS
from tests.families.golden import COLUMNS, COUNTS, FOLDER, Golden, keep


def made(case: str) -> Golden:
    """What transformers writes and answers now."""
    oracle = encoder_decoder_oracle if case in ENCODER_DECODERS else decoder_oracle
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        oracle.save_new(case, folder)
        new = _described(case, folder)
        new.write(folder)
        model = oracle.their_model(case, folder)
        answers = {question: ask(model, case) for question, ask in oracle.QUESTIONS.items()}
    for question in answers:
        if question.startswith("logits"):
            answers[question] = answers[question][..., COLUMNS].contiguous()
    return replace(new, num_learned=oracle.num_learned(model), answers=answers)


def _described(case: str, folder: Path) -> Golden:
    """What a folder is made again from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    return Golden(case=case, config=config, shapes=shapes, num_learned=0, answers={})


def made_counts() -> dict[str, int]:
    """How many parameters transformers' models of the presets learn now."""
    presets = (name for name in families.presets() if families.find_preset(name).encoder is None)
    return {name: _num_learned(name) for name in sorted((*presets, *BUILT_BY_THEM))}


def _num_learned(preset: str) -> int:
    pairs = preset in BUILT_BY_THEM
    with torch.device("meta"):
        config = AutoConfig.for_model(**families.to_hf(families.find_preset(preset)))
        model = (AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM).from_config(config)
    return (encoder_decoder_oracle if pairs else decoder_oracle).num_learned(model)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    keep([made(case) for case in (*CASES, *ENCODER_DECODERS)])
    COUNTS.write_text(json.dumps(made_counts(), indent=2) + "\n", encoding="utf-8")
