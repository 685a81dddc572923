"""Tokenizers of whole words and the text encoders that fit them."""

import pytest
from transformers import CLIPTokenizer

from zoo.errors import UserError
from zoo.pipelines.words import build_text_encoder, build_tokenizer, speaks_shapes
from zoo.scene import WORDS


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORDS, 24)


def test_every_word_is_one_token_in_any_case(tokenizer):
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end
        assert tokenizer(word.upper()).input_ids == tokenizer(word).input_ids


def test_a_word_inside_another_is_no_token(tokenizer):
    red = tokenizer("red").input_ids[1]
    assert red not in tokenizer("redness bored").input_ids


def test_nothing_is_lost_of_unknown_words(tokenizer):
    first, second = tokenizer("zebra 😀").input_ids, tokenizer("zebra 😁").input_ids
    assert first != second
    assert tokenizer.unk_token_id not in first[:-1]


def test_saved_and_read_again_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a large striped red circle left of a zebra 😀"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == 24


def test_the_encoder_takes_what_the_tokenizer_gives(tokenizer):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_text_encoder(tokenizer, small)
    ids = tokenizer(["a red circle", ""], padding="max_length", return_tensors="pt")
    out = model(**ids)
    assert out.last_hidden_state.shape == (2, 24, 16)
    assert out.pooler_output.shape == (2, 16)
    with pytest.raises(UserError, match="hidden size"):
        build_text_encoder(tokenizer, {**small, "hidden_size": 17})


def test_tokenizers_of_shapes_world_are_told_from_others(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert speaks_shapes(CLIPTokenizer.from_pretrained(tmp_path))
    assert not speaks_shapes(build_tokenizer(["red"], 24))
    assert not speaks_shapes(build_tokenizer([*WORDS, "lighthouse"], 24))
    assert not speaks_shapes(None)
