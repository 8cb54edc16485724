import pytest

from vltrain.demo.questions import every_text
from vltrain.demo.start import RANKS
from vltrain.demo.vocabulary import learn_ranks, tiktoken_file


def test_the_most_frequent_pair_becomes_the_first_token():
    ranks = learn_ranks(["abab ab", "cd"], 257)

    assert ranks[256:] == [b"ab"]


def test_tokens_grow_out_of_tokens():
    assert learn_ranks(["abc", "abc", "ab"], 258)[256:] == [b"ab", b"abc"]


def test_no_token_reaches_over_two_digits():
    with pytest.raises(ValueError, match="pairs for 256 tokens"):
        learn_ranks(["12 12 12"], 257)


def test_a_vocabulary_file_has_a_base64_token_and_its_rank_on_each_line():
    assert tiktoken_file([b"a", b"bc"]) == "YQ== 0\nYmM= 1\n"


def test_the_demos_vocabulary_has_single_tokens_for_what_every_sample_says():
    ranks = learn_ranks(every_text(), RANKS)

    assert len(ranks) == len(set(ranks)) == 551
    for text in ("user", "assistant", "Picture", " digit", "数字", "),("):
        assert text.encode() in ranks
