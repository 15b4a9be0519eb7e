"""A small real Llama checkpoint: trained with a plain loop, kept for the next run."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
import transformers
from demo_report import progress_bar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class BaseSettings:
    """Size and training of the base checkpoint; lengths and batches in tokens and sequences."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    sequence_length: int = 128
    batch_size: int = 8
    steps: int = 640
    learning_rate: float = 3e-3
    seed: int = 0


def make_checkpoint(
    folder: Path, settings: BaseSettings, texts: list[str], tokenizer_texts: list[str]
) -> Path:
    """Train a base model on `texts`, or find the one that the same settings and texts made before.

    Args:
        folder: Where checkpoints are kept, one folder each, named by a hash of all that made it.
        settings: Sizes and steps.
        texts: What the model is trained on.
        tokenizer_texts: What the tokenizer learns its merges on besides.

    Returns:
        The checkpoint's folder, as `AutoModelForCausalLM.from_pretrained` reads it.
    """
    recipe = [
        asdict(settings),
        transformers.__version__,
        torch.__version__,
        Path(__file__).read_text(),
    ]
    digest = hashlib.sha256(json.dumps([recipe, texts, tokenizer_texts]).encode()).hexdigest()[:12]
    target, unfinished = folder / f"base-{digest}", folder / f"base-{digest}.unfinished"
    if target.is_dir():
        return target
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(chain(texts, tokenizer_texts), settings)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=4 * settings.sequence_length,
            tie_word_embeddings=True,
            initializer_range=settings.hidden_size**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    train(model, pack(tokenizer, texts, settings.sequence_length), settings)
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)
    return target


def train_tokenizer(texts: Iterator[str], settings: BaseSettings) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with one special token that begins, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], sequence_length: int) -> Tensor:
    """Token ids of all texts, an end token after each, cut into rows: (rows, sequence_length)."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    flat = torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])
    rows = len(flat) // sequence_length
    if rows == 0:
        raise ValueError(
            f"The text holds {len(flat)} tokens, fewer than one sequence of {sequence_length}; "
            "give more text or a smaller --sequence-length"
        )
    return flat[: rows * sequence_length].view(rows, sequence_length)


def train(model: PreTrainedModel, rows: Tensor, settings: BaseSettings) -> None:
    """A plain loop: AdamW, one warm-up, one cosine, rows in a seeded random order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine((step + 1) / settings.steps)
    )
    order = torch.Generator().manual_seed(settings.seed)
    model.train()
    with progress_bar("base checkpoint", settings.steps) as advance:
        for _ in range(settings.steps):
            chosen = torch.randint(len(rows), (settings.batch_size,), generator=order)
            batch = rows[chosen].to(model.device)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(f"loss {loss.item():.3f}")


def warm_cosine(progress: float, warm_up: float = 0.1) -> float:
    """Share of the peak learning rate: up over the first tenth, then half a cosine down to 5%."""
    if progress < warm_up:
        return progress / warm_up
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, rows: Tensor, batch_size: int = 8) -> float:
    """Mean nats per predicted token of `rows` (rows, tokens), in eval mode."""
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in rows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / rows[:, 1:].numel()


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Logits of `rows` in eval mode, on the CPU: (rows, tokens, vocabulary)."""
    return model.eval()(input_ids=rows.to(model.device)).logits.cpu()
