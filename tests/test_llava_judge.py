"""What counts as right: an answer, two equal answers, a pair of pictures."""

import math

import pytest

from train_encoder.evaluate.judge import answers_right, is_answer, names_answer, pairs_right, same_answer, share


def test_an_answer_must_be_the_answer_and_nothing_more():
    assert is_answer(" Medium.", "medium")
    assert not is_answer("medium-dark", "medium") and not is_answer("red or blue", "red")


def test_the_same_answer_in_other_letters_is_the_same():
    assert same_answer("A red  square.", "a Red square")
    assert not same_answer("red", "reddish")


@pytest.mark.parametrize("text", ["red", "A red circle.", "a red one"])
def test_a_sentence_is_told_by_the_words_that_the_other_lacks(text):
    assert names_answer(text, "a red circle", "a blue circle")


@pytest.mark.parametrize("text", ["blue", "a circle", "red or blue", ""])
def test_what_names_the_other_or_none_or_both_is_wrong(text):
    assert not names_answer(text, "a red circle", "a blue circle")


def test_each_picture_of_a_pair_has_its_own_right_answer():
    assert answers_right(["red", "blue"], ("red", "blue")) == (True, True)
    assert answers_right(["red", "red"], ("red", "blue")) == (True, False)
    assert answers_right(["blue", "red"], ("red", "blue")) == (False, False)


def test_a_pair_counts_when_both_pictures_are_right():
    assert pairs_right([True, True, True, False, False, True]) == [True, False, False]
    assert pairs_right([True, True, True]) == [True]  # the third's partner is not there yet


def test_the_share_of_nothing_is_unknown():
    assert share([True, False, False, True]) == 0.5 and math.isnan(share([]))
