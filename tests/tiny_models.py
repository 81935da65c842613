"""Tiny random models of transformers in local folders, and examples that they can learn in a few steps."""

import io
import json
import random
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bigmodel_fast.data import find_documents, labelled_snippets

PACKAGES = ("transformers", "jsonargparse", "yaml", "safetensors", "matplotlib", "sklearn", "rich")  # that they need
SCALE = 0.15  # of random weights, for a width of 32: at transformers' 0.02 little of a text would reach the head
SHAPE = {
    "initializer_range": SCALE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


KINDS = {"def": "DEFINITION", "class": "DEFINITION", "if": "BRANCH", "else": "BRANCH", "for": "LOOP", "while": "LOOP"}


def word_tokenizer(texts: Iterable[str], pair: bool = True) -> Any:
    """One token for each word or sign that occurs; [CLS] text [SEP] as BERT's, or text </s>."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    raw = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=1500, special_tokens=special))
    if pair:
        raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="</s>", bos_token="</s>",
    )  # fmt: skip


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_bert(folder: Path, texts: Iterable[str], **how: Any) -> str:
    """The folder of a BERT without a head."""
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer(texts)
    torch.manual_seed(0)
    config = {**SHAPE, "max_position_embeddings": 64, "vocab_size": len(tokenizer), **how}
    return save(BertModel(BertConfig(**config)), tokenizer, folder)


def tiny_gpt2(folder: Path, texts: Iterable[str]) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = word_tokenizer(texts, pair=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=SCALE
    )
    return save(GPT2LMHeadModel(config), tokenizer, folder)


def tiny_bart(folder: Path, texts: Iterable[str]) -> str:
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = word_tokenizer(texts, pair=False)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        init_std=SCALE, pad_token_id=0, bos_token_id=4, eos_token_id=4, decoder_start_token_id=4, forced_eos_token_id=4,
    )  # fmt: skip
    return save(BartForConditionalGeneration(config), tokenizer, folder)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sources(most: int) -> list[str]:
    """Files of the standard library, the smallest first."""
    files = sorted(find_documents(), key=lambda f: (f.stat().st_size, f))
    return [f.read_text(encoding="utf-8", errors="replace") for f in files if f.stat().st_size > 3000][:most]


def tagged_code(most: int) -> list[dict[str, Any]]:
    """Words of the standard library with tags: those that define, that branch, and that repeat; `not in` is one."""
    rows = []
    for text in sources(most):
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (tokenize.TokenError, SyntaxError):
            continue
        words = [t.string for t in tokens if t.type in (tokenize.NAME, tokenize.OP)]
        tags = [f"B-{KINDS[word]}" if word in KINDS else "O" for word in words]
        for i in range(len(words) - 1):
            if words[i : i + 2] == ["not", "in"]:
                tags[i : i + 2] = ["B-TEST", "I-TEST"]
        for start in range(0, len(words) - 30, 30):
            rows.append({"tokens": words[start : start + 30], "tags": tags[start : start + 30]})
    return [row for row in rows if set(row["tags"]) != {"O"}]


def questions(most: int) -> list[dict[str, Any]]:
    """Contexts in which one word is a number: the answer to each question. Some are longer than a window."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "rats", "go", "by"]
    rows = []
    for i in range(most):
        context = [draw.choice(words) for _ in range(draw.choice((8, 12, 60)))]
        number = str(10 + i % 30)
        context[draw.randrange(len(context))] = number
        text = " ".join(context)
        answers = {"text": [number], "answer_start": [text.index(number)]}
        rows.append({"question": "how many rats ?", "context": text, "answers": answers})
    return rows


def phrases(most: int) -> list[dict[str, str]]:
    """Numbers in words of one language for those of another."""
    english, german = ["one", "two", "three", "four", "five", "six"], ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
    draw = random.Random(0)
    rows = []
    for _ in range(most):
        chosen = draw.randrange(6)
        rows.append({"source": f"i see {english[chosen]} cats", "target": f"ich sehe {german[chosen]} katzen"})
    return rows


def labelled_code(folder: Path) -> tuple[str, str, str]:
    """A tiny BERT, and files of labelled snippets of the standard library to train and to validate on."""
    parts = [[e.values for e in part][::4] for part in labelled_snippets()]
    model = tiny_bert(folder / "bert", (row["text"] for row in parts[0]))
    files = [write_lines(folder / f"{name}.jsonl", rows) for name, rows in zip(("train", "dev"), parts, strict=True)]
    return model, *files
