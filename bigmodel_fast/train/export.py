"""Our models as those of transformers, and their tokenizers: BERT as BERT, GPT as GPT-2 or, layout modern, as Llama."""

from typing import Any

import torch
from torch import Tensor

from ..data import Tokenizer
from ..data.tokenizer import END, byte_alphabet
from ..models import BERT, GPT

MASK = "<|mask|>"


def hugging_face_config(model: GPT | BERT, end: int) -> Any:
    """The config of transformers for a model of this shape whose documents end with token `end`."""
    from transformers import BertConfig, GPT2Config, LlamaConfig

    if isinstance(model, BERT):
        return BertConfig(**model.hf_config())
    config = model.config
    tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if config.layout == "gpt2":
        return GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context, n_embd=config.width, n_layer=config.layers,
            n_head=config.heads, n_inner=config.hidden, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.hidden,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.key_heads,
        max_position_embeddings=config.context, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, **tokens,
    )  # fmt: skip


def hugging_face_state(model: GPT | BERT) -> dict[str, Tensor]:
    """The model's weights under the names of BertForMaskedLM, GPT2LMHeadModel or LlamaForCausalLM."""
    if isinstance(model, BERT) or model.config.layout == "gpt2":
        return model.hf_state_dict()
    own, c = model.state_dict(), model.config
    state = {"model.embed_tokens.weight": own["embedding.weight"], "lm_head.weight": own["embedding.weight"]}
    state["model.norm.weight"] = own["norm.weight"]
    sizes = [c.heads * c.head_dim, c.key_heads * c.head_dim, c.key_heads * c.head_dim]
    for i in range(c.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        parts = own[ours + "attention.qkv.weight"].split(sizes)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            state[f"{theirs}self_attn.{name}.weight"] = part
        state[theirs + "self_attn.o_proj.weight"] = own[ours + "attention.out.weight"]
        for name in ("gate", "up", "down"):
            state[f"{theirs}mlp.{name}_proj.weight"] = own[f"{ours}mlp.{name}.weight"]
        state[theirs + "input_layernorm.weight"] = own[ours + "norm1.weight"]
        state[theirs + "post_attention_layernorm.weight"] = own[ours + "norm2.weight"]
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def hugging_face_tokenizer(tokenizer: Tokenizer, model: GPT | BERT) -> Any:
    """The same tokens as a tokenizer of transformers; bytes become a byte-level BPE without merges.

    A BERT's puts the end of a document before each text and after it, and has the mask token, with which it also pads.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizer.bpe
    if bpe is None:
        alphabet = byte_alphabet()
        bpe = tokenizers.Tokenizer(models.BPE(vocab={**alphabet, END: tokenizer.end}, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    how: dict[str, Any] = {"eos_token": END, "bos_token": END, "pad_token": END}
    if isinstance(model, BERT):
        bpe = tokenizers.Tokenizer.from_str(bpe.to_str())  # not the one that others hold
        bpe.add_special_tokens([MASK])  # the number behind the others, as in training
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{END} $A {END}",
            pair=f"{END} $A {END} $B:1 {END}:1",
            special_tokens=[(END, tokenizer.end)],
        )
        how |= {"cls_token": END, "sep_token": END, "mask_token": MASK, "pad_token": MASK}
        how["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **how)
