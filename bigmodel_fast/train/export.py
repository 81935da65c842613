"""Our GPT as a model of transformers: layout gpt2 as GPT-2, layout modern as Llama, and its tokenizer."""

from typing import Any

import torch
from torch import Tensor

from ..data import Tokenizer
from ..data.tokenizer import END, byte_alphabet
from ..models import GPT, GPTConfig


def hugging_face_config(config: GPTConfig, end: int) -> Any:
    """The config of transformers for a GPT of this shape whose documents end with token `end`."""
    from transformers import GPT2Config, LlamaConfig

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


def hugging_face_state(gpt: GPT) -> dict[str, Tensor]:
    """The GPT's weights under the names of GPT2LMHeadModel or LlamaForCausalLM."""
    if gpt.config.layout == "gpt2":
        return gpt.hf_state_dict()
    own, c = gpt.state_dict(), gpt.config
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


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any:
    """The same tokens as a tokenizer of transformers; bytes become a byte-level BPE without merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizer.bpe
    if bpe is None:
        alphabet = byte_alphabet()
        bpe = tokenizers.Tokenizer(models.BPE(vocab={**alphabet, END: tokenizer.end}, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
