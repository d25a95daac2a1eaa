"""Pre-train the nano base model from scratch by masked-language modelling on the miniature language."""

from __future__ import annotations

import hashlib
import json
import random
import time
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import RobertaProcessing
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM, get_linear_schedule_with_warmup

from . import language, tasks
from .config import check_out
from .errors import InputError
from .models import adapted_names, load_masked_lm
from .provenance import provenance, write_json

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's order: ids 0 to 4
VOCABULARY_SAMPLE = 20_000
HELD_OUT = 1024

# Judged by the held-out loss, the heads and the leading singular values, never by a count: `base_sizes`.
NANO = {"hidden_size": 128, "layers": 4, "heads": 4, "intermediate_size": 512, "max_length": 96, "steps": 10_000,
        "batch_size": 64, "learning_rate": 1.5e-3, "weight_decay": 0.01, "warmup_ratio": 0.06, "mask_share": 0.15,
        "seed": 0}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, from a fixed sample of documents and task examples; pairs are joined as RoBERTa joins them."""
    words = set()
    for index in range(VOCABULARY_SAMPLE):
        words.update(language.document("train", 0, index).split())
    for name in tasks.TASKS:
        for example in tasks.examples(name, "train", VOCABULARY_SAMPLE // 10):
            words.update(f"{example.text} {example.text_pair or ''}".split())
    vocabulary = {word: i for i, word in enumerate(SPECIAL + sorted(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>",
                                   sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
                                   model_max_length=NANO["max_length"], padding_side="right")


def build_model(vocabulary_size: int, settings: dict) -> RobertaForMaskedLM:
    """A RoBERTa with random weights, fixed by the seed."""
    torch.manual_seed(settings["seed"])
    return RobertaForMaskedLM(RobertaConfig(
        vocab_size=vocabulary_size, hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"], intermediate_size=settings["intermediate_size"],
        max_position_embeddings=settings["max_length"] + 2, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, bos_token_id=0, pad_token_id=1, eos_token_id=2))


def sequence(tokenizer: PreTrainedTokenizerFast, text: str, rng: random.Random) -> list[int]:
    """A document as token ids; half the documents of two sentences or more are cut into a pair of segments."""
    sentences = text.removesuffix(" .").split(" . ")
    if len(sentences) > 1 and rng.random() < 0.5:
        cut = rng.randrange(1, len(sentences))
        first, second = (" . ".join(part) + " ." for part in (sentences[:cut], sentences[cut:]))
        return tokenizer(first, second, truncation=True)["input_ids"]
    return tokenizer(text, truncation=True)["input_ids"]


def pad(sequences: list[list[int]], value: int) -> torch.Tensor:
    """A (batch, length) tensor of ids, short rows filled with `value`."""
    length = max(map(len, sequences))
    return torch.tensor([row + [value] * (length - len(row)) for row in sequences])


def mask(ids: torch.Tensor, share: float, vocabulary_size: int, generator: torch.Generator):
    """RoBERTa's masking: `share` of the words are predicted; of these 80 % are masked, 10 % replaced, 10 % kept.

    Returns (inputs, labels), both (batch, length); labels are -100 where nothing is predicted.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL))
    labels = torch.where(chosen, ids, -100)
    roll = torch.rand(ids.shape, generator=generator)
    words = torch.randint(len(SPECIAL), vocabulary_size, ids.shape, generator=generator)
    inputs = torch.where(chosen & (roll < 0.8), SPECIAL.index("<mask>"), ids)
    return torch.where(chosen & (roll >= 0.9), words, inputs), labels


BUCKET = 16  # batches whose documents are drawn together and sorted by length, so that little padding is computed


@lru_cache(maxsize=4)
def _bucket(tokenizer, seed: int, split: str, number: int, size: int) -> list[list[list[int]]]:
    """The rows of `BUCKET` batches: documents of one stretch of the stream, sorted by length, batches shuffled."""
    rng = random.Random(f"bucket:{split}:{seed}:{number}")
    first = number * BUCKET * size
    rows = [sequence(tokenizer, language.document(split, seed, first + i), rng) for i in range(BUCKET * size)]
    rows.sort(key=len)
    batches = [rows[i * size:(i + 1) * size] for i in range(BUCKET)]
    rng.shuffle(batches)
    return batches


def batch(tokenizer, settings: dict, split: str, number: int, size: int):
    """Masked batch `number`: a pure function of the settings' seed, so that any step can be made again."""
    seed = settings["seed"]
    ids = pad(_bucket(tokenizer, seed, split, number // BUCKET, size)[number % BUCKET], SPECIAL.index("<pad>"))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + (split != "train"))
    return (ids, *mask(ids, settings["mask_share"], len(tokenizer), generator))


def held_out_loss(model, tokenizer, settings: dict) -> float:
    """Masked-LM loss in nats per predicted token on fixed documents of the validation split."""
    total = predicted = 0.0
    with torch.inference_mode():
        for number in range(BUCKET):
            ids, inputs, labels = batch(tokenizer, settings, "validation", number, HELD_OUT // BUCKET)
            count = int((labels >= 0).sum())
            loss = model(input_ids=inputs, attention_mask=(ids != 1).long(), labels=labels).loss
            total, predicted = total + loss.item() * count, predicted + count
    return total / predicted


def check_settings(settings: dict) -> None:
    """Raise InputError for a setting that `NANO` does not have."""
    unknown = set(settings) - set(NANO)
    if unknown:
        raise InputError(f"setting {sorted(unknown)[0]!r} is unknown; wanted one of {', '.join(NANO)}")


def pretrain(out: str | Path, settings: dict | None = None, stop_after: int | None = None, progress: bool = True,
             command: str = "intruder pretrain nano") -> dict:
    """Pre-train the nano base and write `model.safetensors`, the tokenizer and `record.json` to the folder `out`.

    settings: differences from `NANO`.  stop_after: end early after so many steps of the same schedule, to compare the
    first losses with the committed record; nothing but the record is written then.  Returns the record.
    Raises InputError for an unknown setting, or if `out` cannot be written to or already holds a model.
    """
    check_settings(settings or {})
    out, settings = Path(out), NANO | (settings or {})
    check_out(out)
    if (out / "model.safetensors").exists():
        raise InputError(f"{out} already holds a model; wanted a new folder, e.g. --out runs/nano")
    origin, clock = provenance(command), time.perf_counter()
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.98),
                                  weight_decay=settings["weight_decay"])
    steps = settings["steps"]
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings["warmup_ratio"] * steps), steps)
    first_losses, curve = [], []
    bar = tqdm(range(min(steps, stop_after or steps)), desc="pre-training", unit="step", disable=not progress)
    for step in bar:
        ids, inputs, labels = batch(tokenizer, settings, "train", step, settings["batch_size"])
        loss = model(input_ids=inputs, attention_mask=(ids != 1).long(), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step < 10:
            first_losses.append(round(loss.item(), 6))
        if (step + 1) % max(1, steps // 12) == 0:
            held_out = round(held_out_loss(model.eval(), tokenizer, settings), 5)
            curve.append({"step": step + 1, "held_out_loss": held_out})
            model.train()
            bar.set_postfix(held_out=curve[-1]["held_out_loss"])
    record = {"schema": 1, "kind": "pretrain", "preset": "nano", "status": "complete" if not stop_after else "partial",
              "settings": settings, "parameters": sum(p.numel() for p in model.parameters()),
              "vocabulary": len(tokenizer), "first_losses": first_losses, "curve": curve,
              "provenance": origin | {"wall_seconds": round(time.perf_counter() - clock, 1)}}
    if not stop_after:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(out)
        model.eval().save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)
        record |= describe(out, settings["seed"])
    write_json(out / "record.json", record)
    return record


def describe(folder: str | Path, seed: int = 0) -> dict:
    """Hash and spectra of the saved weights: {'sha256', 'spectral_head': one entry for each adapted matrix}.

    `head` is how many singular values exceed the largest one of a matrix with the same entries in random places: those
    directions are clear of the random bulk. `top_ratio` is the largest singular value over that one.
    """
    folder, generator, rows = Path(folder), torch.Generator().manual_seed(seed), []
    model = load_masked_lm(str(folder))
    for name in adapted_names(model):
        weight = model.get_submodule(name).weight.detach()
        shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=generator)].reshape(weight.shape)
        edge, S = torch.linalg.svdvals(shuffled)[0], torch.linalg.svdvals(weight)
        rows.append({"name": name, "head": int((S > edge).sum()), "of": len(S),
                     "top_ratio": round(float(S[0] / edge), 3)})
    return {"sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), "spectral_head": rows}
