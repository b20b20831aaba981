#!/usr/bin/env python3
"""Makes a tiny model with random weights, and its tokenizer, on this machine: nothing is downloaded.

The weights come from a fixed seed, and they are large enough that the next token depends on every token before it: a
KV cache with one wrong block answers something else.

    python tools/tiny_model.py OUT_DIR [--kind qwen3]      (the kinds: tiny_kinds.py)
    python tools/tiny_model.py models --kind all           every kind that is not there yet, as models/tiny-KIND
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tiny_kinds import KINDS, MAX_POSITIONS, VOCABULARY

SEED = 20
ORIGIN = "origin.json"  # what a whole model directory has

WORDS = """
a about above after again air all also and animal another answer any are around as ask at away back be because
been before began below between big book both boy but by call came can car carry change children city close
come cold could country cut day did different do does done down draw each earth eat end enough even every
example eye face family far father feet few find fire first fish five follow food for found four from
gave get girl give go good great green group grow had hand hard has have he head hear help her here
high him his home horse house how idea if important in into is it just keep kind king know land large last late
learn leave left letter life light like line list little live long look made make man many may me mean men might
mile money more morning most mother mountain move much must my name near need never new next night no north not
now number of off often old on once one only open or order other our out over own page paper part people
plant play point put question quick read real red right river road rock room round run said same saw say school
sea second see seem sentence set she ship short should show side simple small snow some song soon sound south
stand star start state step still stop story study such sun sure table take talk tell ten than that the their
them then there these they thing think this those thought three through time to together too took top
town tree true turn two under unit until up upon us use vowel voice walk want war warm was watch water way we
well went were what wheel when where which while white who whole why will wind with wood word work world would
write year yes yet you young your
""".split()  # noqa: SIM905


def make_tokenizer(out: Path) -> None:
    """Byte pairs learned from shuffled plain words: any text encodes, and most answers read as words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    shuffle = random.Random(SEED)  # noqa: S311 -- reproducible, not secret
    sentences = [" ".join(shuffle.choices(WORDS, k=10)) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not the model's {VOCABULARY}")
    make_wrapper: Any = PreTrainedTokenizerFast  # untyped in some releases of transformers, typed in others
    wrapped = make_wrapper(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        model_max_length=MAX_POSITIONS,
    )
    wrapped.save_pretrained(str(out))


def make_model(out: Path, kind: str) -> None:
    """Writes the model directory whole or not at all: a half-written one would be found by the next run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    import torch

    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.manual_seed(SEED)
    KINDS[kind].make().float().save_pretrained(str(partial))
    make_tokenizer(partial)
    (partial / ORIGIN).write_text(json.dumps({"kind": kind, "seed": SEED}), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=[*sorted(KINDS), "all"], default="qwen3")
    arguments = parser.parse_args()
    wanted = {arguments.kind: arguments.out}
    if arguments.kind == "all":
        wanted = {kind: arguments.out / f"tiny-{kind}" for kind in KINDS}
        wanted = {kind: out for kind, out in wanted.items() if not (out / ORIGIN).is_file()}
    for kind, out in wanted.items():
        make_model(out, kind)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
