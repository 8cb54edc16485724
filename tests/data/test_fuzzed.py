"""Damaged files, records, texts and pictures give findings or a VltrainError, nothing else."""

import pytest
from fuzzed import (
    a_file_is_checked,
    a_picture_is_looked_at,
    a_record_is_examined,
    a_source_is_looked_up,
    a_text_is_taken_apart,
    good_picture,
)
from hypothesis import given, settings
from strategies import ANYTHING, MARKUP, PICTURES, damaged_files, damaged_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    good_picture(folder)
    return folder


@settings(max_examples=200, deadline=None)
@given(damaged_files())
def test_any_file_gives_a_report(file):
    a_file_is_checked(*file)


@settings(max_examples=300, deadline=None)
@given(damaged_records() | ANYTHING)
def test_any_record_has_errors_or_a_sample(folder, value):
    a_record_is_examined(value, folder)


@settings(max_examples=300, deadline=None)
@given(MARKUP)
def test_any_text_is_taken_apart(text):
    a_text_is_taken_apart(text)


@settings(max_examples=200, deadline=None)
@given(PICTURES)
def test_any_bytes_are_a_picture_or_have_a_fault(content):
    a_picture_is_looked_at(content)


@settings(max_examples=200, deadline=None)
@given(MARKUP)
def test_any_name_of_a_picture_has_a_size_or_a_fault(source):
    a_source_is_looked_up(source)
