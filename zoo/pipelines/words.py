"""Tokenizers and text encoders that need no download: every word of a small language is one token."""

from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from zoo.errors import UserError
from zoo.scene import WORDS

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(words: Iterable[str], max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token; anything else is spelt out in bytes, never lost.

    Args:
        words: lower-case words.
        max_length: tokens of a prompt, start and end included; the rest is cut off.
    """
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=max_length,
    )
    # Not as merges of letter pairs: those of one word split others.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def speaks_shapes(tokenizer: Any) -> bool:  # noqa: ANN401 (any tokenizer, or none)
    """Whether a tokenizer was built on the words of shapes world."""
    return isinstance(tokenizer, CLIPTokenizer) and {*tokenizer.get_added_vocab()} - {_START, _END} == {*WORDS}


def build_text_encoder(tokenizer: CLIPTokenizer, keywords: dict[str, Any]) -> CLIPTextModel:
    """A CLIP text model with random weights that fits a tokenizer.

    Args:
        tokenizer: from `build_tokenizer`.
        keywords: of transformers' CLIPTextConfig, such as hidden_size.

    Raises:
        UserError: keywords that CLIPTextConfig refuses.
    """
    fixed = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return CLIPTextModel(CLIPTextConfig(**keywords, **fixed))
    except Exception as error:  # its checks raise a class of their own, below none of Python's
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"text_encoder: CLIPTextConfig refuses it ({reason}); correct its keywords") from error


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]
